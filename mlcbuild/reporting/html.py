"""Builds as one static HTML page: the matrix as a grid, failures with their logs, what changed, quality against size.

Nothing is loaded from anywhere: styles, plots and the few lines that filter the grid are in the page (page.html.j2).
It is readable on a phone, and without scripts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mlcbuild.reporting import plots
from mlcbuild.reporting.changes import changes
from mlcbuild.reporting.history import STATUSES, Cell, Run
from mlcbuild.text import amount, duration

_FEW, _MOST_CHANGES, _MOST_CLOUDS = 10, 200, 60  # changes that are seen at once; what is shown at all
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
    environment.filters |= {
        "power": plots.power,
        "when": _when,
        "amount": amount,
        "duration": duration,
        "facts": _facts,
        "worst": _worst,
    }
    run, changed = runs[-1], changes(runs)
    clouds = plots.clouds(run.cells)
    targets = sorted({cell.target for cell in run.cells})
    return environment.get_template("page.html.j2").render(
        run=run,
        runs=runs,
        counts=run.counts,
        statuses=list(STATUSES),
        targets=targets,
        rows=_rows(run, targets),
        lines=[plots.line(name, [get(each) for each in runs], show) for name, get, show in _TRENDS if len(runs) > 1],
        failures=_failures(run),
        changes=changed,
        few=_FEW,
        most=_MOST_CHANGES,
        clouds=clouds[:_MOST_CLOUDS],
        more_clouds=len(clouds) - _MOST_CLOUDS,
        longest=max(run.kinds.values(), default=0.0),
        sizes=plots,
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


def _failures(run: Run) -> list[tuple[tuple[str, str], list[Cell]]]:
    """Reasons with their logs, each once, and the recipes that failed by them: many share a step."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in run.cells:
        if cell.status == "failed":
            found.setdefault((cell.failure, cell.log), []).append(cell)
    return [*found.items()]


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


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
