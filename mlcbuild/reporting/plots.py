"""Points on the plots of a report page, in the units of their SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlcbuild.reporting.history import Cell

WIDTH, HEIGHT, _MARGIN = 220, 56, 5  # of a line over the runs
WIDE, HIGH, _LEFT, _AROUND = 340, 200, 52, 16  # of a cloud: package sizes to the right, divergence up
_FLOOR = 1e-4  # nats: a smaller divergence is drawn as this one; quality.json is no finer


@dataclass(frozen=True)
class Dot:
    """One quantization of a model. `anchor`: on which side of the dot its name stands, as SVG calls it."""

    name: str
    x: float
    y: float
    anchor: str
    size: int  # bytes
    kl: float


@dataclass(frozen=True)
class Cloud:
    """Bytes and KL divergence of a model's packages. `ticks`: heights, and the divergence there."""

    model: str
    dots: Sequence[Dot]
    ticks: Sequence[tuple[float, str]]


def line(name: str, values: Sequence[float], show: Callable[[float], str]) -> dict[str, str]:
    """A line through the values, and a dot on the last one."""
    top, step = max(values) or 1.0, (WIDTH - 2 * _MARGIN) / (len(values) - 1)
    points = [
        f"{_MARGIN + i * step:.1f},{HEIGHT - _MARGIN - value / top * (HEIGHT - 2 * _MARGIN):.1f}"
        for i, value in enumerate(values)
    ]
    x, y = points[-1].split(",")
    caption = f"{name}: {show(values[-1])} (largest {show(max(values))})"
    return {"caption": caption, "points": " ".join(points), "x": x, "y": y}


def clouds(cells: Iterable[Cell]) -> list[Cloud]:
    """A cloud for each model with several measured quantizations: each once, as its smallest package."""
    found: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        if cell.kl is not None and cell.size:
            known = found.setdefault(cell.model, {})
            if cell.quantization not in known or cell.size < known[cell.quantization].size:
                known[cell.quantization] = cell
    return [_cloud(model, known) for model, known in sorted(found.items()) if len(known) > 1]


def _cloud(model: str, cells: Mapping[str, Cell]) -> Cloud:
    logs = {name: math.log10(max(cell.kl or 0.0, _FLOOR)) for name, cell in cells.items()}
    low, high = math.floor(min(logs.values())), math.ceil(max(logs.values()))
    high = max(high, low + 1)
    smallest, largest = min(cell.size for cell in cells.values()), max(cell.size for cell in cells.values())

    def x(size: int) -> float:
        return _LEFT + (size - smallest) / (largest - smallest or 1) * (WIDE - _LEFT - _AROUND)

    def y(log: float) -> float:
        return HIGH - 2 * _AROUND - (log - low) / (high - low) * (HIGH - 3 * _AROUND)

    dots = [
        Dot(name, x(c.size), y(logs[name]), "start" if x(c.size) < WIDE / 2 else "end", c.size, c.kl or 0.0)
        for name, c in sorted(cells.items(), key=lambda item: item[1].size)
    ]
    return Cloud(model, dots, [(y(power), f"{10.0**power:g}") for power in range(low, high + 1)])
