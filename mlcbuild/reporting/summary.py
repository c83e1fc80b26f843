"""A build as Markdown, for the summary pages of CI systems."""

from __future__ import annotations

from collections.abc import Sequence

from mlcbuild.reporting.history import STATUSES, Cell, Run
from mlcbuild.text import amount

_MARKS = {"failed": "❌", "not tried": "⏭️", "unavailable": "➖", "built": "✅", "hit": "☑️"}
_SHOWN = 200  # rows: GitHub cuts summaries at 1 MiB


def markdown(runs: Sequence[Run]) -> str:
    """The latest run: one line of counts, a table of recipes (the worst first), and what failed."""
    run = runs[-1]
    lines = [
        f"## mlcbuild: {run.counts or 'no recipes'}",
        "",
        f"{run.built} tasks done, {run.hit} up to date, {run.failed} failed, {run.skipped} not tried; "
        f"{run.seconds:.1f} s" + ("" if run.ended else " — the build did not end"),
        "",
        "| recipe | status | time | size | KL | why |",
        "|---|---|---:|---:|---:|---|",
    ]
    cells = sorted(run.cells, key=lambda cell: (STATUSES.index(cell.status), cell.recipe))
    lines += [_row(cell) for cell in cells[:_SHOWN]]
    if len(cells) > _SHOWN:
        lines += ["", f"… and {len(cells) - _SHOWN} more recipes"]
    for cell in cells:
        if cell.status == "failed":
            text = "\n".join(part for part in (cell.failure, cell.log) if part)
            fence = "`" * max(3, max((len(run) for run in _backquotes(text)), default=0) + 1)
            lines += ["", f"### {cell.recipe}", "", f"{fence}text", text, fence]
    return "\n".join(lines) + "\n"


def _row(cell: Cell) -> str:
    why = "; ".join(cell.why[:3]) + ("; …" if len(cell.why) > 3 else "")
    shown = [
        f"`{cell.recipe}`",
        f"{_MARKS[cell.status]} {cell.status}",
        f"{cell.seconds:.1f} s" if cell.seconds else "",
        amount(cell.size) if cell.size else "",
        f"{cell.kl:.4f}" if cell.kl is not None else "",
        why,
    ]
    return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in shown)} |"


def _backquotes(text: str) -> list[str]:
    return "".join(character if character == "`" else " " for character in text).split()
