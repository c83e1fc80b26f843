"""Choices of experts in the experts' order, and tiles of them, each of one expert: what products of many rows take.

Choice p is one of token p // count's. A stable counting sort, in two kernels: how many choices of each part of the
tokens are each expert's; then every expert's choices go to their places. No atomics: a thread counts one expert's, so
that what comes out does not depend on the order of threads.

Nothing is padded to the largest expert: expert e, whose c choices begin at place s of the order, has tiles from
s // TILE + e on. They end before those of the next one: floor(s / TILE) + ceil(c / TILE) <= floor((s + c) / TILE) + 1.
Where a tile is left between, it is empty. So there are choices // TILE + experts of them, which the host knows without
having seen a choice. (MLC LLM's moe_misc.get_indices and vLLM's moe_align_block_size are for the same.)
"""

from __future__ import annotations

import functools
from typing import Any

from tvm import relax
from tvm.script import tirx as T

from mlcbuild.compiler.operations import call_all
from mlcbuild.models.operations import Expr

TILE = 128  # choices, the largest block of cuda_many.py
FIELDS = 3  # of a tile: its expert, the place of its first choice, and that behind the expert's last
_PART = 1024  # choices that a block counts
_THREADS = 128


def few(experts: int) -> int:
    """Up to how many choices CUDA's products use no plan.

    At one for each expert, 63 % of the experts are chosen, and rows one by one read and unpack half more than tiles do.
    A tile of a row or two costs about that much more than reading its matrix: it reads activations for all of its rows.
    """
    return experts


def tile_count(choices: Any, experts: int) -> Any:
    """How many tiles there are, empty ones among them."""
    return choices // TILE + experts


def parts(choices: Any) -> Any:
    return (choices + _PART - 1) // _PART


def emit(builder: relax.BlockBuilder, chosen: Expr, experts: int, most_few: int) -> list[Expr]:
    """The order and the tiles of chosen experts [n, count], of so many in all; none are made of `most_few` choices."""
    n, count = chosen.ty.shape
    choices = n * count
    shapes = [choices], [tile_count(choices, experts), FIELDS], [parts(choices), experts]
    results = [(shape, "int32") for shape in shapes]
    return call_all(builder, plan(experts, int(count), most_few), "plan_experts", [chosen], results)[:2]


@functools.cache
def plan(experts: int, count: int, most_few: int) -> Any:
    """chosen [n, count] int32 -> order [n * count] int32, tiles [tiles, FIELDS] int32, counts [parts, experts] int32.

    order: choices, expert after expert; those of one as the tokens come. counts are work space. Of up to
    `most_few` choices, nothing is written.
    """
    each = -(-experts // _THREADS)

    @T.prim_func(s_tir=True, private=True)
    def plan_experts(var_chosen: T.handle, var_order: T.handle, var_tiles: T.handle, var_counts: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        n = T.int32()
        chosen = T.match_buffer(var_chosen, (n, count), "int32")
        order = T.match_buffer(var_order, (n * count,), "int32")
        tiles = T.match_buffer(var_tiles, (tile_count(n * count, experts), FIELDS), "int32")
        counts = T.match_buffer(var_counts, (parts(n * count), experts), "int32")
        if n * count > most_few:
            for bx in T.thread_binding(parts(n * count), thread="blockIdx.x"):
                for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with T.sblock("count"):
                        T.reads()
                        T.writes()
                        part = T.sblock_alloc_buffer((_PART,), "int32", scope="shared")
                        total = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        _load(chosen, part, n * count, count, bx, tx)
                        for i in range(each):
                            if i * _THREADS + tx < experts:
                                total[0] = 0
                                for j in range(T.min(_PART, n * count - bx * _PART)):
                                    total[0] += T.cast(part[j] == i * _THREADS + tx, "int32")
                                counts[bx, i * _THREADS + tx] = total[0]
            for bx in T.thread_binding(parts(n * count), thread="blockIdx.x"):
                for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with T.sblock("place"):
                        T.reads()
                        T.writes()
                        part = T.sblock_alloc_buffer((_PART,), "int32", scope="shared")
                        totals = T.sblock_alloc_buffer((experts,), "int32", scope="shared")
                        before = T.sblock_alloc_buffer((each,), "int32", scope="local")
                        own = T.sblock_alloc_buffer((2,), "int32", scope="local")
                        for i in range(each):
                            if i * _THREADS + tx < experts:
                                own[0] = 0
                                before[i] = 0
                                for b in range(parts(n * count)):
                                    before[i] += T.if_then_else(b < bx, counts[b, i * _THREADS + tx], 0)
                                    own[0] += counts[b, i * _THREADS + tx]
                                totals[i * _THREADS + tx] = own[0]
                        _load(chosen, part, n * count, count, bx, tx)
                        for i in range(each):
                            if i * _THREADS + tx < experts:
                                own[0] = 0
                                for e in range(i * _THREADS + tx):
                                    own[0] += totals[e]
                                if bx == 0:
                                    own[1] = own[0] + totals[i * _THREADS + tx]
                                    for j in range(own[1] // TILE - own[0] // TILE + 1):
                                        tile: T.let[T.int32] = own[0] // TILE + i * _THREADS + tx + j
                                        tiles[tile, 0] = i * _THREADS + tx
                                        tiles[tile, 1] = own[0] + j * TILE
                                        tiles[tile, 2] = own[1]
                                own[0] += before[i]
                                for j in range(T.min(_PART, n * count - bx * _PART)):
                                    own[1] = part[j]
                                    if own[1] == i * _THREADS + tx:
                                        order[own[0]] = bx * _PART + j
                                        own[0] += 1

    return plan_experts


@T.macro
def _load(chosen, part, choices, count, bx, tx):
    """A block's choices, for all of its threads."""
    for i in range(_PART // _THREADS):
        p: T.let[T.int32] = bx * _PART + i * _THREADS + tx
        if p < choices:
            part[i * _THREADS + tx] = chosen[p // count, p % count]
    T.tvm_storage_sync("shared")
