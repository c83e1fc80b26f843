"""What is otherwise than before."""

from __future__ import annotations

from collections.abc import Sequence

from mlcbuild.reporting.history import Cell, Run
from mlcbuild.text import amount

_WELL = ("built", "hit")


def changes(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Recipes of the last run that are new, fail, work again, or whose package has another divergence or size; and how.

    Each is compared with the last run before that had it: a run may be of some recipes only.
    """
    known = {cell.recipe: cell for run in runs[:-1] for cell in run.cells}
    found = ((cell.recipe, _change(known.get(cell.recipe), cell)) for cell in runs[-1].cells) if known else ()
    return [(name, text) for name, text in found if text]


def _change(old: Cell | None, new: Cell) -> str:
    if old is None:
        return "is new"
    if old.status != new.status and not (old.status in _WELL and new.status in _WELL):
        return f"{old.status} → {new.status}"
    facts = []
    if old.kl is not None and new.kl is not None:
        facts.append(("KL ", f"{old.kl:.4f}", f"{new.kl:.4f}"))
    if old.size and new.size:
        facts.append(("", amount(old.size), amount(new.size)))
    return ", ".join(f"{what}{was} → {now}" for what, was, now in facts if was != now)
