"""Choosing tokens by their probabilities on GPUs.

One block of threads works on one row. Each thread has a contiguous part of it; the thread whose part a running sum
(block_sums.py) crosses walks through that part.
"""

from __future__ import annotations

import functools
from typing import Any

from tvm.script import tirx as T

from mlcbuild.compiler.gpu.block_sums import running_sums, summed

_BITS = 31  # of a float that is not negative; as many steps find one by bisection
_INFINITY = 0x7F800000


@functools.cache
def kept_mass(threads: int) -> Any:
    """probs [b, V], the likeliest first, top_p [b] -> the mass [b] of the fewest first ones that reach top_p."""

    @T.prim_func(s_tir=True, private=True)
    def top_p_mass(var_probs: T.handle, var_top_p: T.handle, var_mass: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        batch = T.int32()
        width = T.int32()
        probs = T.match_buffer(var_probs, (batch, width), "float32")
        top_p = T.match_buffer(var_top_p, (batch,), "float32")
        mass = T.match_buffer(var_mass, (batch,), "float32")
        for bx in T.thread_binding(batch, thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("mass"):
                    T.reads()
                    T.writes()
                    exchange = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
                    run = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    own = T.sblock_alloc_buffer((3,), "float32", scope="local")
                    each: T.let[T.int32] = (width + threads - 1) // threads
                    running_sums(probs, bx, width, each, threads, tx, exchange, run, own)
                    if tx == 0 and own[2] < top_p[bx]:
                        mass[bx] = own[2]
                    if (tx == 0 or own[0] < top_p[bx]) and top_p[bx] <= own[1]:
                        run[0] = own[0]
                        for i in range(each):
                            if tx * each + i < width and (run[0] < top_p[bx] or tx * each + i == 0):
                                run[0] = run[0] + probs[bx, tx * each + i]
                        mass[bx] = run[0]

    return top_p_mass


@functools.cache
def choose(threads: int, with_mass: bool) -> Any:
    """probs [b, V], mass [b], uniform [s], rows [s] int32 -> [s] int32: where in its row each choice lies.

    The first place up to which the probabilities sum to more than uniform * mass; without `with_mass`, which has no
    such argument then, than uniform times the sum of the row.
    """

    @T.prim_func(s_tir=True, private=True)
    def choose_of_mass(
        var_probs: T.handle, var_mass: T.handle, var_uniform: T.handle, var_rows: T.handle, var_chosen: T.handle
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        batch = T.int32()
        width = T.int32()
        samples = T.int32()
        probs = T.match_buffer(var_probs, (batch, width), "float32")
        mass = T.match_buffer(var_mass, (batch,), "float32")
        uniform = T.match_buffer(var_uniform, (samples,), "float32")
        rows = T.match_buffer(var_rows, (samples,), "int32")
        chosen = T.match_buffer(var_chosen, (samples,), "int32")
        for bx in T.thread_binding(samples, thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("choose"):
                    T.reads()
                    T.writes()
                    _choose(probs, rows, uniform, mass, chosen, width, threads, bx, tx)

    @T.prim_func(s_tir=True, private=True)
    def choose_of_all(var_probs: T.handle, var_uniform: T.handle, var_rows: T.handle, var_chosen: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        batch = T.int32()
        width = T.int32()
        samples = T.int32()
        probs = T.match_buffer(var_probs, (batch, width), "float32")
        uniform = T.match_buffer(var_uniform, (samples,), "float32")
        rows = T.match_buffer(var_rows, (samples,), "int32")
        chosen = T.match_buffer(var_chosen, (samples,), "int32")
        for bx in T.thread_binding(samples, thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("choose"):
                    T.reads()
                    T.writes()
                    _choose(probs, rows, uniform, None, chosen, width, threads, bx, tx)

    return choose_of_mass if with_mass else choose_of_all


@T.macro
def _walk(probs, row, wanted, width, each, tx, run, own, found, chosen, at):
    """The thread whose part the running sum crosses `wanted` in writes where; thread 0 where none does."""
    if tx == 0 and wanted >= own[2]:
        chosen[at] = 0
    if own[0] <= wanted and wanted < own[1]:
        run[0] = own[0]
        found[0] = tx * each
        for i in range(each):
            if tx * each + i < width and run[0] <= wanted:
                # Rounding may leave the walk just short of the part's sum: then the last likely place counts.
                if probs[row, tx * each + i] > T.float32(0):
                    found[0] = tx * each + i
                run[0] = run[0] + probs[row, tx * each + i]
        chosen[at] = found[0]


@T.macro
def _choose(probs, rows, uniform, mass, chosen, width, threads, bx, tx):
    """Choice `bx` by a block of threads."""
    exchange = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
    run = T.sblock_alloc_buffer((1,), "float32", scope="local")
    own = T.sblock_alloc_buffer((3,), "float32", scope="local")
    found = T.sblock_alloc_buffer((1,), "int32", scope="local")
    each: T.let[T.int32] = (width + threads - 1) // threads
    running_sums(probs, rows[bx], width, each, threads, tx, exchange, run, own)
    if mass is None:
        _walk(probs, rows[bx], uniform[bx] * own[2], width, each, tx, run, own, found, chosen, bx)
    else:
        _walk(probs, rows[bx], uniform[bx] * mass[rows[bx]], width, each, tx, run, own, found, chosen, bx)


@functools.cache
def renormalize(threads: int) -> Any:
    """probs [b, V], top_p [b], hints [b, .] -> probs [b, V] with only the likeliest, to the mass top_p, left.

    The smallest probability that is left is found by bisection over the bits of a float; `hints` are not needed.
    """

    @T.prim_func(s_tir=True, private=True)
    def renormalize_rows(var_probs: T.handle, var_top_p: T.handle, var_hints: T.handle, var_out: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        batch = T.int32()
        width = T.int32()
        hint_count = T.int32()
        probs = T.match_buffer(var_probs, (batch, width), "float32")
        top_p = T.match_buffer(var_top_p, (batch,), "float32")
        hints = T.match_buffer(var_hints, (batch, hint_count), "float32")  # noqa: F841
        out = T.match_buffer(var_out, (batch, width), "float32")
        for bx in T.thread_binding(batch, thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("renormalize"):
                    T.reads()
                    T.writes()
                    exchange = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
                    own = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    low = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    high = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    tried = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    low[0] = 0
                    high[0] = _INFINITY
                    for step in range(_BITS + 1):  # the last step sums what is left
                        tried[0] = T.if_then_else(step < _BITS, low[0] + (high[0] - low[0]) // 2, low[0])
                        own[0] = T.float32(0)
                        for i in range((width + threads - 1) // threads):
                            if i * threads + tx < width:  # noqa: SIM102 (the script has no short circuit)
                                if probs[bx, i * threads + tx] >= T.reinterpret("float32", tried[0]):
                                    own[0] = own[0] + probs[bx, i * threads + tx]
                        summed(exchange, own, tx, threads)
                        if own[0] >= top_p[bx]:
                            low[0] = tried[0]
                        else:
                            high[0] = tried[0]
                    for i in range((width + threads - 1) // threads):
                        if i * threads + tx < width:
                            out[bx, i * threads + tx] = T.if_then_else(
                                probs[bx, i * threads + tx] >= T.reinterpret("float32", tried[0]),
                                probs[bx, i * threads + tx] / own[0],
                                T.float32(0),
                            )

    return renormalize_rows
