"""Builds as one static HTML page: the matrix as a grid, failures with their logs, trends as small plots.

Nothing is loaded from anywhere: styles and plots are in the page (page.html.j2), there is no script, and it is readable
on a phone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mlcbuild.reporting.history import STATUSES, Cell, Run
from mlcbuild.text import amount

_WIDTH, _HEIGHT, _MARGIN = 220, 56, 5  # of a plot
# What is plotted over the runs, and how a value is shown; the worst KL is of all packages.
_TRENDS: tuple[tuple[str, Callable[[Run], float], Callable[[float], str]], ...] = (
    ("seconds", lambda run: run.seconds, lambda value: f"{value:.1f} s"),
    ("recipes built", lambda run: run.count("built"), lambda value: f"{value:.0f}"),
    ("recipes failed", lambda run: run.count("failed"), lambda value: f"{value:.0f}"),
    ("bytes of all packages", lambda run: sum(cell.size for cell in run.cells), amount),
    ("largest KL", lambda run: max((cell.kl or 0.0 for cell in run.cells), default=0.0), lambda v: f"{v:.4f}"),
)


def html(runs: Sequence[Run]) -> str:
    """The latest run as a grid, and how it came there. `runs`: the earliest first, at least one."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"when": _when, "facts": _facts, "worst": _worst}
    targets = sorted({cell.target for cell in runs[-1].cells})
    return environment.get_template("page.html.j2").render(
        run=runs[-1],
        runs=runs,
        counts=runs[-1].counts,
        statuses=list(STATUSES),
        targets=targets,
        rows=_rows(runs[-1], targets),
        plots=[_plot(name, [get(run) for run in runs], show) for name, get, show in _TRENDS] if len(runs) > 1 else [],
        width=_WIDTH,
        height=_HEIGHT,
    )


def _rows(run: Run, targets: Sequence[str]) -> list[tuple[str, list[list[Cell]]]]:
    """A row per model and quantization, with the recipes of each target."""
    rows: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    for cell in run.cells:
        rows.setdefault((cell.model, cell.quantization), {}).setdefault(cell.target, []).append(cell)
    return [
        (f"{model} {quantization}".strip(), [by_target.get(target, []) for target in targets])
        for (model, quantization), by_target in sorted(rows.items())
    ]


def _worst(cells: Iterable[Cell]) -> str:
    return min((cell.status for cell in cells), key=STATUSES.index)


def _facts(cell: Cell) -> str:
    facts = (
        f"{cell.seconds:.1f} s" if cell.seconds else "",
        amount(cell.size) if cell.size else "",
        f"KL {cell.kl:.4f}" if cell.kl is not None else "",
        cell.quality if cell.quality != "passed" else "",
        f"executed: {cell.executed}" if cell.executed not in ("", "yes") else "",
    )
    return " · ".join(fact for fact in facts if fact)


def _plot(name: str, values: Sequence[float], show: Callable[[float], str]) -> dict[str, str]:
    """A line through the values, and a dot on the last one."""
    top, step = max(values) or 1.0, (_WIDTH - 2 * _MARGIN) / (len(values) - 1)
    points = [
        f"{_MARGIN + i * step:.1f},{_HEIGHT - _MARGIN - value / top * (_HEIGHT - 2 * _MARGIN):.1f}"
        for i, value in enumerate(values)
    ]
    x, y = points[-1].split(",")
    caption = f"{name}: {show(values[-1])} (largest {show(max(values))})"
    return {"caption": caption, "points": " ".join(points), "x": x, "y": y}


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
