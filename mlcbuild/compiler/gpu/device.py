"""What the schedules want to know of a GPU, from its TVM target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Device:
    """kind: TVM's; threads: of one block at most; shared: bytes that a block's threads share.

    lanes: threads that go along a row together. Where they are one warp, sums over them are shuffles.
    row_groups, rows: a block takes row_groups * rows rows of a matrix, each thread `rows` of them.
    vector: bytes that a thread loads at once. ahead: words of a matrix's row that a thread has on their way, a power of
    two.
    """

    kind: str
    threads: int
    shared: int
    lanes: int
    row_groups: int
    rows: int
    vector: int
    ahead: int


# lanes, row_groups, rows, vector, ahead
_SHAPES = {
    "cuda": (32, 4, 2, 16, 4),
    "rocm": (32, 4, 2, 16, 4),
    "metal": (32, 4, 2, 8, 2),
    "opencl": (32, 4, 2, 8, 2),
    "vulkan": (32, 4, 2, 8, 2),
    "webgpu": (32, 4, 2, 8, 2),
}


def device_of(target: Mapping[str, Any]) -> Device:
    """The device of a resolved TVM target for a GPU."""
    kind = target["kind"]
    threads = int(target.get("max_threads_per_block", target.get("max_num_threads", 256)))
    return Device(kind, threads, int(target.get("max_shared_memory_per_block", 16384)), *_SHAPES[kind])
