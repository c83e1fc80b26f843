"""Sorting rows of probabilities on GPUs: the likeliest first, of equal ones the first token first.

Tiles of a row are sorted in shared memory by Batcher's bitonic network, then merged pairwise, twice as many at each
pass. In a pass each thread finds by bisection where its part of the result begins in both halves ("merge path", Green
et al., 2012) and merges a few elements. No thread relies on another one of its warp, so that narrow subgroups do not
matter.
"""

from __future__ import annotations

import functools
from typing import Any

from tvm.script import tirx as T

TILE = 1024
_EACH = 8  # elements that one thread merges
_DOUBLE_PASSES = 10  # of two passes: enough for 2^30 tokens
_STEPS = 31  # of the bisection: one per bit of a row's length


@functools.cache
def sort_rows(threads: int) -> Any:
    """values [b, V] float32 -> sorted [b, V], where they were [b, V] int32, and the same again as work space."""
    stages = TILE.bit_length() - 1
    pairs = TILE // 2 // threads
    mine = TILE // threads

    @T.prim_func(s_tir=True, private=True)
    def sort_probabilities(
        var_values: T.handle, var_keys: T.handle, var_places: T.handle, var_spare_keys: T.handle,
        var_spare_places: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        batch = T.int32()
        width = T.int32()
        values = T.match_buffer(var_values, (batch, width), "float32")
        keys = T.match_buffer(var_keys, (batch, width), "float32")
        places = T.match_buffer(var_places, (batch, width), "int32")
        spare_keys = T.match_buffer(var_spare_keys, (batch, width), "float32")
        spare_places = T.match_buffer(var_spare_places, (batch, width), "int32")
        for by in T.thread_binding(batch, thread="blockIdx.y"):
            for bx in T.thread_binding((width + TILE - 1) // TILE, thread="blockIdx.x"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("tile"):
                        T.reads()
                        T.writes()
                        key = T.sblock_alloc_buffer((TILE,), "float32", scope="shared")
                        place = T.sblock_alloc_buffer((TILE,), "int32", scope="shared")
                        held = T.sblock_alloc_buffer((2,), "float32", scope="local")
                        held_place = T.sblock_alloc_buffer((2,), "int32", scope="local")
                        for i in range(mine):
                            key[i * threads + tx] = T.if_then_else(
                                bx * TILE + i * threads + tx < width,
                                values[by, bx * TILE + i * threads + tx],
                                T.min_value("float32"),
                            )
                            place[i * threads + tx] = bx * TILE + i * threads + tx
                        T.tvm_storage_sync("shared")
                        for stage in range(stages):
                            for step in range(stage + 1):
                                for i in range(pairs):
                                    apart: T.let[T.int32] = T.shift_left(1, stage - step)
                                    pair: T.let[T.int32] = i * threads + tx
                                    low: T.let[T.int32] = 2 * pair - T.bitwise_and(pair, apart - 1)
                                    high: T.let[T.int32] = low + apart
                                    falling: T.let[T.int32] = T.bitwise_and(T.shift_right(low, stage + 1), 1)
                                    held[0] = key[low]
                                    held[1] = key[high]
                                    held_place[0] = place[low]
                                    held_place[1] = place[high]
                                    wrong: T.let[T.int32] = T.if_then_else(
                                        held[1] > held[0] or (held[1] == held[0] and held_place[1] < held_place[0]),
                                        1,
                                        0,
                                    )
                                    if wrong != falling:
                                        key[low] = held[1]
                                        place[low] = held_place[1]
                                        key[high] = held[0]
                                        place[high] = held_place[0]
                                T.tvm_storage_sync("shared")
                        for i in range(mine):
                            if bx * TILE + i * threads + tx < width:
                                keys[by, bx * TILE + i * threads + tx] = key[i * threads + tx]
                                places[by, bx * TILE + i * threads + tx] = place[i * threads + tx]
        for double in range(_double_passes(width)):
            _merge(batch, width, threads, T.shift_left(TILE, 2 * double), keys, places, spare_keys, spare_places)
            _merge(batch, width, threads, T.shift_left(TILE, 2 * double + 1), spare_keys, spare_places, keys, places)

    return sort_probabilities


def _double_passes(width: Any) -> Any:
    """How often two passes, of runs of TILE * 4^i and twice that, have to be made."""
    total: Any = T.int32(0)
    for i in range(_DOUBLE_PASSES):
        total = total + T.cast(width > TILE << (2 * i), "int32")
    return total


@T.macro
def _merge(batch, width, threads, run, keys, places, out_keys, out_places):
    """Neighbouring runs of `run` sorted elements become one."""
    for by in T.thread_binding(batch, thread="blockIdx.y"):
        for bx in T.thread_binding((width + threads * _EACH - 1) // (threads * _EACH), thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("merge"):
                    T.reads()
                    T.writes()
                    low = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    high = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    other = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    start: T.let[T.int32] = (bx * threads + tx) * _EACH
                    if start < width:
                        base: T.let[T.int32] = start // (2 * run) * (2 * run)
                        left: T.let[T.int32] = T.min(run, width - base)
                        right: T.let[T.int32] = T.max(T.min(run, width - base - run), 0)
                        skip: T.let[T.int32] = start - base
                        low[0] = T.max(skip - right, 0)
                        high[0] = T.min(skip, left)
                        for _step in range(_STEPS):
                            if low[0] < high[0]:
                                middle: T.let[T.int32] = (low[0] + high[0]) // 2
                                a: T.let[T.int32] = base + middle
                                b: T.let[T.int32] = base + run + skip - 1 - middle
                                if keys[by, a] > keys[by, b] or (
                                    keys[by, a] == keys[by, b] and places[by, a] < places[by, b]
                                ):
                                    low[0] = middle + 1
                                else:
                                    high[0] = middle
                        other[0] = skip - low[0]
                        for i in range(_EACH):
                            if start + i < width:
                                x: T.let[T.int32] = base + T.min(low[0], left - 1)
                                y: T.let[T.int32] = base + T.min(run + T.min(other[0], right - 1), width - 1 - base)
                                if other[0] >= right or (
                                    low[0] < left
                                    and (
                                        keys[by, x] > keys[by, y]
                                        or (keys[by, x] == keys[by, y] and places[by, x] < places[by, y])
                                    )
                                ):
                                    out_keys[by, start + i] = keys[by, x]
                                    out_places[by, start + i] = places[by, x]
                                    low[0] = low[0] + 1
                                else:
                                    out_keys[by, start + i] = keys[by, y]
                                    out_places[by, start + i] = places[by, y]
                                    other[0] = other[0] + 1
