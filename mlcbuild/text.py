"""Figures as people read them: counts, bytes, times and tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any


def plural(number: int, one: str, many: str = "") -> str:
    """`recipe` or `recipes`; `many` is for words that do not just take an `s`."""
    return one if number == 1 else many or f"{one}s"


def count(number: int, one: str, many: str = "") -> str:
    """`1 recipe`, `3 libraries`, `1,000 steps`."""
    return f"{number:,} {plural(number, one, many)}"


def amount(number: float, unit: str = "bytes") -> str:
    """`12.3 MB`, `17 tensors`."""
    if unit != "bytes":
        return f"{number:.0f} {unit}"
    for name in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {name}" if name == "B" else f"{number:.1f} {name}"
        number /= 1000
    return f"{number:.1f} GB"


def duration(seconds: float) -> str:
    """`0.3 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def executed(quality: Mapping[str, Any]) -> str:
    """What ran a package's library, by its quality report: `yes`, `no` with the reason, or its kernels on what."""
    found, execution = quality.get("library_executed"), quality.get("execution") or {}
    if found == "emulated":
        return "its kernels, on an emulated device"
    if found == "device":
        return f"its kernels, on {execution.get('device', 'a GPU')}"
    if found is False and execution.get("reason"):
        return f"no: {execution['reason']}"
    return "unknown" if found is None else "yes" if found else "no"


def ago(then: float) -> str:
    """`3 days ago`, of a time in seconds since 1970."""
    seconds = max(0.0, time.time() - then)
    for unit, length in (("day", 86400), ("hour", 3600)):
        if seconds >= length:
            number = int(seconds // length)
            return f"{number} {plural(number, unit)} ago"
    return "within the hour"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, the first column to the left, the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]).rstrip() for row in rows]
