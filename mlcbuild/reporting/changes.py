"""What is otherwise than in the run before."""

from __future__ import annotations

from mlcbuild.reporting.history import Cell, Run
from mlcbuild.text import amount

_WELL = ("built", "hit")


def changes(before: Run, after: Run) -> list[tuple[str, str]]:
    """Recipes that came, went, fail, work again, or whose package has another divergence or size; and how."""
    old, new = ({cell.recipe: cell for cell in run.cells} for run in (before, after))
    found = ((name, _change(old.get(name), new.get(name))) for name in sorted({*old, *new}))
    return [(name, text) for name, text in found if text]


def _change(old: Cell | None, new: Cell | None) -> str:
    if old is None or new is None:
        return "is new" if old is None else "is not among the recipes any more"
    if old.status != new.status and not (old.status in _WELL and new.status in _WELL):
        return f"{old.status} → {new.status}"
    facts = (
        (f"KL {old.kl:.4f}", f"{new.kl:.4f}") if old.kl is not None and new.kl is not None else ("", ""),
        (amount(old.size), amount(new.size)) if old.size and new.size else ("", ""),
    )
    return ", ".join(f"{was} → {now}" for was, now in facts if was.removeprefix("KL ") != now)
