"""What the schedules want to know of a GPU, from its TVM target."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Device:
    """kind: TVM's; threads: of one block at most, and no more than 256, which is enough.

    lanes: threads that go along a row together. Where they are one warp, sums over them are shuffles.
    row_groups, rows: a block takes row_groups * rows rows of a matrix, each thread `rows` of them.
    vector: bytes that a thread loads at once. ahead: words of a matrix's row that a thread has on their way, a power of
    two. early: kernels may begin before the ones before them have ended (CUDA, from compute capability 9.0 on; CUDA
    programming guide, "Programmatic Dependent Launch").
    """

    kind: str
    threads: int
    lanes: int
    row_groups: int
    rows: int
    vector: int
    ahead: int
    early: bool


EARLIEST = 90  # the first architecture whose kernels may begin before the ones before them have ended
_WIDE = ("cuda", "rocm")  # these have many loads of 16 bytes on their way


def device_of(target: Mapping[str, Any]) -> Device:
    """The device of a resolved TVM target for a GPU."""
    kind = target["kind"]
    threads = min(256, int(target.get("max_threads_per_block", target.get("max_num_threads", 256))))
    vector, ahead = (16, 4) if kind in _WIDE else (8, 2)
    number = re.match(r"sm_(\d+)", str(target.get("arch", ""))) if kind == "cuda" else None
    early = number is not None and int(number.group(1)) >= EARLIEST
    return Device(kind, threads, lanes=32, row_groups=4, rows=2, vector=vector, ahead=ahead, early=early)
