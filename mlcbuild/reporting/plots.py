"""Points on the plots of a report page, in the units of their SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlcbuild.reporting.history import Cell

WIDTH, HEIGHT, _MARGIN = 220, 56, 5  # of a line over the runs
WIDE, HIGH, _LEFT, _AROUND = 340, 200, 52, 16  # of a cloud: package sizes to the right, divergence up
_LETTER, _LINE = 6.5, 12  # how wide a letter of a name is, at most, and how high a line of it
_FLOOR = 1e-4  # nats: a smaller divergence is drawn as this one; quality.json is no finer


@dataclass(frozen=True)
class Dot:
    """One quantization of a model. `anchor`: on which side of the dot its name stands, as SVG calls it; `name_y`: where
    its name's line is, above the dot or where no other name is."""

    name: str
    x: float
    y: float
    anchor: str
    size: int  # bytes
    kl: float
    name_y: float


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


def power(kl: float) -> float:
    """The power of ten that a divergence is drawn as."""
    return math.log10(max(kl, _FLOOR))


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
    logs = {name: power(cell.kl or 0.0) for name, cell in cells.items()}
    low, high = math.floor(min(logs.values())), math.ceil(max(logs.values()))
    high = max(high, low + 1)
    smallest, largest = min(cell.size for cell in cells.values()), max(cell.size for cell in cells.values())

    def x(size: int) -> float:
        return _LEFT + (size - smallest) / (largest - smallest or 1) * (WIDE - _LEFT - _AROUND)

    def y(log: float) -> float:
        return HIGH - 2 * _AROUND - (log - low) / (high - low) * (HIGH - 3 * _AROUND)

    dots: list[Dot] = []
    taken: list[tuple[float, float, float]] = []  # left, right and line of the names so far
    for name, c in sorted(cells.items(), key=lambda item: item[1].size):
        at, anchor = x(c.size), "start" if x(c.size) < WIDE / 2 else "end"
        left = at if anchor == "start" else at - _LETTER * len(name)
        right = left + _LETTER * len(name)
        above = y(logs[name]) - 7
        lines = [above + _LINE * step for i in range(len(cells)) for step in (-i, i + 2)]  # upwards, and below the dot
        line = next(
            (
                each
                for each in lines
                if _LINE <= each <= HIGH - 2 * _AROUND + _LINE
                and all(right < start or end < left or abs(each - other) >= _LINE for start, end, other in taken)
            ),
            above,
        )
        taken.append((left, right, line))
        dots.append(Dot(name, at, y(logs[name]), anchor, c.size, c.kl or 0.0, line))
    return Cloud(model, dots, [(y(log), f"{10.0**log:g}") for log in range(low, high + 1)])
