"""Builds as one static HTML page: the matrix as a grid, failures with their logs, trends as small plots.

Nothing is loaded from anywhere: styles and plots are in the page, there is no script, and it is readable on a phone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from html import escape

from mlcbuild.reporting.history import STATUSES, Cell, Run
from mlcbuild.text import amount

_STYLE = """
:root { color-scheme: light dark; --ok: #1a7f37; --hit: #57606a; --bad: #cf222e; --mild: #9a6700; --line: #8884; }
@media (prefers-color-scheme: dark) { :root { --ok: #3fb950; --hit: #9da7b3; --bad: #ff7b72; --mild: #d29922; } }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 0.8rem; max-width: 80rem; }
h1 { font-size: 1.3rem; margin: 0.2rem 0; } h2 { font-size: 1.05rem; margin: 1.4rem 0 0.4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 100%; }
th, td { border: 1px solid var(--line); padding: 0.3rem 0.5rem; text-align: left; vertical-align: top; }
thead th { font-weight: 600; } tbody th { font-weight: 500; overflow-wrap: anywhere; min-width: 8rem; }
td { min-width: 8.5rem; border-left: 4px solid var(--line); }
td.built { border-left-color: var(--ok); } td.hit { border-left-color: var(--hit); }
td.failed { border-left-color: var(--bad); } td.not-tried, td.unavailable { border-left-color: var(--mild); }
.status { font-weight: 600; } .built .status { color: var(--ok); } .failed .status { color: var(--bad); }
.hit .status { color: var(--hit); } .not-tried .status, .unavailable .status { color: var(--mild); }
.facts, .when, figcaption { font-size: 0.85rem; opacity: 0.85; }
details { font-size: 0.85rem; } summary { cursor: pointer; padding: 0.2rem 0; } li { overflow-wrap: anywhere; }
pre { overflow-x: auto; max-height: 24rem; padding: 0.6rem; border: 1px solid var(--line); font-size: 0.8rem; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; } svg { display: block; max-width: 100%; }
polyline { fill: none; stroke: currentColor; stroke-width: 1.5; } circle { fill: currentColor; }
"""
_WIDTH, _HEIGHT = 220, 56  # of a plot


def html(runs: Sequence[Run]) -> str:
    """The latest run as a grid, and how it came there. `runs`: the earliest first, at least one."""
    run = runs[-1]
    counts = ", ".join(f"{run.count(status)} {status}" for status in STATUSES if run.count(status))
    parts = [
        f"<h1>{escape(counts or 'no recipes')}</h1>",
        f'<p class="when">{_when(run.time)}, {run.seconds:.1f} s; {run.built} tasks done, {run.hit} up to date, '
        f"{run.failed} failed, {run.skipped} not tried{'' if run.ended else '; the build did not end'}</p>",
        _failures(run),
        "<h2>Recipes</h2>",
        _grid(run),
        _trends(runs),
        _history(runs),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>mlcbuild: {escape(counts)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _grid(run: Run) -> str:
    """A row per model and quantization, a column per target."""
    targets = sorted({cell.target for cell in run.cells})
    rows: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    for cell in run.cells:
        rows.setdefault((cell.model, cell.quantization), {}).setdefault(cell.target, []).append(cell)
    head = "".join(f'<th scope="col">{escape(target)}</th>' for target in targets)
    body = []
    for (model, quantization), by_target in sorted(rows.items()):
        cells = "".join(_square(by_target.get(target, [])) for target in targets)
        body.append(f'<tr><th scope="row">{escape(f"{model} {quantization}".strip())}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table>\n<thead><tr><th scope="col">model, quantization</th>{head}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(body)}\n</tbody>\n</table></div>"
    )


def _square(cells: Sequence[Cell]) -> str:
    """The recipes of one place in the grid; mostly one, several where overrides or templates differ."""
    if not cells:
        return "<td></td>"
    worst = min(cells, key=lambda cell: STATUSES.index(cell.status))
    return f'<td class="{worst.status.replace(" ", "-")}">{"".join(map(_entry, cells))}</td>'


def _entry(cell: Cell) -> str:
    facts = [
        f"{cell.seconds:.1f} s" if cell.seconds else "",
        amount(cell.size) if cell.size else "",
        f"KL {cell.kl:.4f}" if cell.kl is not None else "",
        cell.quality if cell.quality not in ("", "passed") else "",
    ]
    shown = escape(" · ".join(fact for fact in facts if fact))
    link = f'<a href="#{_anchor(cell)}">failed</a>' if cell.status == "failed" else cell.status
    text = f'<div title="{escape(cell.recipe)}"><span class="status">{link}</span>'
    text += f'<div class="facts">{shown}</div>' if shown else ""
    if cell.why:
        reasons = "".join(f"<li>{escape(reason)}</li>" for reason in cell.why)
        text += f"<details><summary>why rebuilt</summary><ul>{reasons}</ul></details>"
    if cell.status == "unavailable":
        text += f"<details><summary>why</summary>{escape(cell.failure)}</details>"
    return f"{text}</div>"


def _failures(run: Run) -> str:
    failed = [cell for cell in run.cells if cell.status == "failed"]
    parts = []
    for cell in failed:
        log = f"<details><summary>its log</summary><pre>{escape(cell.log)}</pre></details>" if cell.log else ""
        parts.append(f'<h3 id="{_anchor(cell)}">{escape(cell.recipe)}</h3><pre>{escape(cell.failure)}</pre>{log}')
    return f"<h2>Failures</h2>{''.join(parts)}" if parts else ""


def _trends(runs: Sequence[Run]) -> str:
    """Plots over the runs; the worst KL is of all packages."""
    if len(runs) < 2:
        return ""
    series: tuple[tuple[str, Callable[[Run], float], Callable[[float], str]], ...] = (
        ("seconds", lambda run: run.seconds, lambda value: f"{value:.1f} s"),
        ("recipes built", lambda run: run.count("built"), lambda value: f"{value:.0f}"),
        ("recipes failed", lambda run: run.count("failed"), lambda value: f"{value:.0f}"),
        ("bytes of all packages", lambda run: sum(cell.size for cell in run.cells), amount),
        ("largest KL", lambda run: max((cell.kl or 0.0 for cell in run.cells), default=0.0), lambda v: f"{v:.4f}"),
    )
    plots = [_plot(name, [get(run) for run in runs], show) for name, get, show in series]
    return f'<h2>The last {len(runs)} runs</h2><div class="plots">{"".join(plots)}</div>'


def _plot(name: str, values: Sequence[float], show: Callable[[float], str]) -> str:
    top, margin = max(values) or 1.0, 5
    step = (_WIDTH - 2 * margin) / (len(values) - 1)
    points = [
        (margin + i * step, _HEIGHT - margin - value / top * (_HEIGHT - 2 * margin)) for i, value in enumerate(values)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    caption = escape(f"{name}: {show(values[-1])} (largest {show(max(values))})")
    return (
        f'<figure><svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{caption}"><polyline points="{line}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/></svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _history(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return ""
    heads = ("when", *STATUSES, "seconds")
    rows = [(_when(run.time), *(str(run.count(status)) for status in STATUSES), f"{run.seconds:.1f}") for run in runs]
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in reversed(rows))
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return (
        f'<details><summary>all runs</summary><div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div></details>"
    )


def _anchor(cell: Cell) -> str:
    return escape(f"failed-{cell.recipe}")


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
