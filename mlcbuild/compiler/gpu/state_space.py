"""Selective scans on GPUs (mlcbuild.models.recurrent.operations: `scan`).

Mamba's channels have rates of their own for each value of their states: a thread has a channel, and goes through its
tokens in order. Mamba-2's have one for a head, whose states are a matrix then: it is asked and written to for a chunk
of tokens at once. Its columns are shared out as mlcbuild.compiler.gpu.memories has it, the formulas are those of the
CPU's kernel (cpu/kernels/state_space.c). There are four barriers for a chunk.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from mlcbuild.compiler.gpu.memories import COLUMNS, sharing
from mlcbuild.compiler.gpu.rows import float32
from mlcbuild.models.recurrent.operations import Scanned

_THREADS = 64  # of a block of channels: few, so that one sequence's channels make many blocks


def scan(s: Scanned) -> Any:
    """x [n, heads * dim], step [n, heads], bias [heads], rate [heads] or [size, heads], b, c [n, groups * size], skip
    [heads], the states before [batch, size * heads * dim] -> out [n, heads * dim], the states after; all float32.
    """
    return _channels(s) if s.each else _heads(s)


@functools.cache
def _channels(s: Scanned) -> Any:
    per_group, width = s.heads // s.groups, s.heads
    blocks = -(-width // _THREADS)
    size, groups = s.size, s.groups
    within, softplus = functools.partial(_within, limits=s.limits), _softplus

    @T.prim_func(s_tir=True, private=True)
    def scan(
        var_x: T.handle, var_step: T.handle, var_bias: T.handle, var_rate: T.handle, var_b: T.handle, var_c: T.handle,
        var_skip: T.handle, var_before: T.handle, var_out: T.handle, var_after: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        n = T.int32()
        batch = T.int32()
        x = T.match_buffer(var_x, (n, width), "float32")
        step = T.match_buffer(var_step, (n, width), "float32")
        bias = T.match_buffer(var_bias, (width,), "float32")
        rate = T.match_buffer(var_rate, (size, width), "float32")
        b = T.match_buffer(var_b, (n, groups * size), "float32")
        c = T.match_buffer(var_c, (n, groups * size), "float32")
        skip = T.match_buffer(var_skip, (width,), "float32")
        before = T.match_buffer(var_before, (batch, size * width), "float32")
        out = T.match_buffer(var_out, (n, width), "float32")
        after = T.match_buffer(var_after, (batch, size * width), "float32")
        for by in T.thread_binding(batch, thread="blockIdx.y"):
            for bx in T.thread_binding(blocks, thread="blockIdx.x"):
                for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with T.sblock("scan"):
                        T.reads()
                        T.writes()
                        state = T.sblock_alloc_buffer((size,), "float32", scope="local")
                        own = T.sblock_alloc_buffer((4,), "float32", scope="local")  # step, what is kept, added, sum
                        channel: T.let[T.int32] = bx * _THREADS + tx
                        first: T.let[T.int32] = channel // per_group * size  # of the group's values
                        if channel < width:
                            for i in range(size):
                                state[i] = before[by, i * width + channel]
                            for t in range(n // batch):
                                own[0] = within(softplus(step[by * (n // batch) + t, channel] + bias[channel]))
                                own[2] = own[0] * x[by * (n // batch) + t, channel]
                                own[3] = skip[channel] * x[by * (n // batch) + t, channel]
                                for i in range(size):
                                    own[1] = T.exp(own[0] * rate[i, channel])
                                    state[i] = own[1] * state[i] + own[2] * b[by * (n // batch) + t, first + i]
                                    own[3] = own[3] + state[i] * c[by * (n // batch) + t, first + i]
                                out[by * (n // batch) + t, channel] = own[3]
                            for i in range(size):
                                after[by, i * width + channel] = state[i]

    return scan


@functools.cache
def _heads(s: Scanned) -> Any:
    size, dim, groups, heads, width = s.size, s.dim, s.groups, s.heads, s.heads * s.dim
    shares = sharing(size)
    parts, rows, ahead, threads = shares.parts, shares.rows, shares.ahead, shares.threads
    blocks, pairs, per_group = -(-dim // COLUMNS), ahead * ahead, heads // groups
    within, softplus = functools.partial(_within, limits=s.limits), _softplus

    @T.prim_func(s_tir=True, private=True)
    def scan(
        var_x: T.handle, var_step: T.handle, var_bias: T.handle, var_rate: T.handle, var_b: T.handle, var_c: T.handle,
        var_skip: T.handle, var_before: T.handle, var_out: T.handle, var_after: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        n = T.int32()
        batch = T.int32()
        x = T.match_buffer(var_x, (n, width), "float32")
        step = T.match_buffer(var_step, (n, heads), "float32")
        bias = T.match_buffer(var_bias, (heads,), "float32")
        rate = T.match_buffer(var_rate, (heads,), "float32")
        b = T.match_buffer(var_b, (n, groups * size), "float32")
        c = T.match_buffer(var_c, (n, groups * size), "float32")
        skip = T.match_buffer(var_skip, (heads,), "float32")
        before = T.match_buffer(var_before, (batch, size * width), "float32")
        out = T.match_buffer(var_out, (n, width), "float32")
        after = T.match_buffer(var_after, (batch, size * width), "float32")
        for by in T.thread_binding(batch * heads, thread="blockIdx.y"):
            for bx in T.thread_binding(blocks, thread="blockIdx.x"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("scan"):
                        T.reads()
                        T.writes()
                        # Of each token what goes in, what is read, its channels, its step, and how the state fades.
                        written = T.sblock_alloc_buffer((ahead, threads), "float32", scope="shared")
                        read = T.sblock_alloc_buffer((ahead, threads), "float32", scope="shared")
                        value = T.sblock_alloc_buffer((ahead, COLUMNS), "float32", scope="shared")
                        steps = T.sblock_alloc_buffer((ahead,), "float32", scope="shared")
                        fade = T.sblock_alloc_buffer((ahead,), "float32", scope="shared")
                        # Of each part: what a token reads of one before, and of the state.
                        dots = T.sblock_alloc_buffer((ahead, ahead, parts), "float32", scope="shared")
                        sums = T.sblock_alloc_buffer((ahead, parts, COLUMNS), "float32", scope="shared")
                        # All of it; how the state has faded until a token; and how much of a token is left behind all.
                        seen = T.sblock_alloc_buffer((ahead, ahead), "float32", scope="shared")
                        until = T.sblock_alloc_buffer((ahead,), "float32", scope="shared")
                        added = T.sblock_alloc_buffer((ahead,), "float32", scope="shared")
                        state = T.sblock_alloc_buffer((rows,), "float32", scope="local")
                        own = T.sblock_alloc_buffer((2,), "float32", scope="local")  # sums, as they come
                        column: T.let[T.int32] = bx * COLUMNS + tx % COLUMNS
                        part: T.let[T.int32] = tx // COLUMNS
                        head: T.let[T.int32] = by % heads
                        group: T.let[T.int32] = head // per_group * size  # its first value
                        for r in range(rows):
                            state[r] = T.float32(0)
                            if part * rows + r < size and column < dim:
                                state[r] = before[by // heads, (part * rows + r) * width + head * dim + column]
                        for chunk in range((n // batch + ahead - 1) // ahead):
                            first: T.let[T.int32] = by // heads * (n // batch) + chunk * ahead
                            held: T.let[T.int32] = T.min(ahead, n // batch - chunk * ahead)
                            T.tvm_storage_sync("shared")
                            for t in range(held):
                                written[t, tx] = T.float32(0)
                                read[t, tx] = T.float32(0)
                                if tx < size:
                                    written[t, tx] = b[first + t, group + tx]
                                    read[t, tx] = c[first + t, group + tx]
                            for turn in range((ahead + parts - 1) // parts):
                                if turn * parts + part < held and column < dim:
                                    value[turn * parts + part, tx % COLUMNS] = x[
                                        first + turn * parts + part, head * dim + column
                                    ]
                            if tx < held:
                                own[0] = within(softplus(step[first + tx, head] + bias[head]))
                                steps[tx] = own[0]
                                fade[tx] = T.exp(own[0] * rate[head])
                            T.tvm_storage_sync("shared")
                            for turn in range((pairs * parts + threads - 1) // threads):
                                at: T.let[T.int32] = turn * threads + tx
                                i: T.let[T.int32] = at // parts // ahead
                                j: T.let[T.int32] = at // parts % ahead
                                if at < pairs * parts and j <= i and i < held:
                                    own[0] = T.float32(0)
                                    for r in range(rows):
                                        # Threads begin at different rows, which lie in different banks.
                                        row: T.let[T.int32] = at % parts * rows + (r + tx) % rows
                                        own[0] = own[0] + written[j, row] * read[i, row]
                                    dots[i, j, at % parts] = own[0]
                            for t in range(held):
                                own[0] = T.float32(0)
                                own[1] = T.float32(0)  # two sums, so that one need not wait for the other
                                for r in range(rows // 2):
                                    own[0] = own[0] + state[r] * read[t, part * rows + r]
                                    own[1] = own[1] + state[rows // 2 + r] * read[t, part * rows + rows // 2 + r]
                                if rows % 2 == 1:
                                    own[0] = own[0] + state[rows - 1] * read[t, part * rows + rows - 1]
                                sums[t, part, tx % COLUMNS] = own[0] + own[1]
                            T.tvm_storage_sync("shared")
                            for turn in range((pairs + threads - 1) // threads):
                                at: T.let[T.int32] = turn * threads + tx
                                i: T.let[T.int32] = at // ahead
                                j: T.let[T.int32] = at % ahead
                                if at < pairs and j <= i and i < held:
                                    own[0] = T.float32(0)
                                    for k in range(parts):
                                        own[0] = own[0] + dots[i, j, k]
                                    own[1] = steps[j]
                                    for t in range(i - j):
                                        own[1] = own[1] * fade[j + 1 + t]
                                    seen[i, j] = own[0] * own[1]
                                    if i == j:
                                        seen[i, j] = own[0] * own[1] + skip[head]
                                        own[0] = T.float32(1)
                                        for t in range(i + 1):
                                            own[0] = own[0] * fade[t]
                                        for t in range(held - 1 - i):
                                            own[1] = own[1] * fade[i + 1 + t]
                                        until[i] = own[0]
                                        added[i] = own[1]
                            T.tvm_storage_sync("shared")
                            for i in range(held):
                                if i % parts == part and column < dim:
                                    own[0] = T.float32(0)
                                    for k in range(parts):
                                        own[0] = own[0] + sums[i, k, tx % COLUMNS]
                                    own[0] = own[0] * until[i]
                                    for j in range(i + 1):
                                        own[0] = own[0] + seen[i, j] * value[j, tx % COLUMNS]
                                    out[first + i, head * dim + column] = own[0]
                            own[0] = T.float32(1)
                            for t in range(held):
                                own[0] = own[0] * fade[t]
                            for r in range(rows):
                                state[r] = state[r] * own[0]
                            if column < dim:
                                for t in range(held):
                                    own[0] = added[t] * value[t, tx % COLUMNS]
                                    for r in range(rows):
                                        state[r] = state[r] + own[0] * written[t, part * rows + r]
                        for r in range(rows):
                            if part * rows + r < size and column < dim:
                                after[by // heads, (part * rows + r) * width + head * dim + column] = state[r]

    return scan


def _softplus(x: Any) -> Any:
    """log(1 + exp(x)) as the CPU's kernel has it (cpu/kernels/state_space.c): small steps keep their precision."""
    u = tirx.exp(-tirx.abs(x))
    s = u / (float32(2) + u)
    series = float32(0)
    for power in range(15, 0, -2):
        series = series * s * s + float32(1 / power)
    return tirx.max(x, float32(0)) + float32(2) * s * series


def _within(value: Any, limits: tuple[float, float]) -> Any:
    """A bound that is no number, or that bounds nothing, is not written: WGSL has no infinity."""
    least, most = limits
    value = tirx.max(value, float32(least)) if least > 0 else value
    return tirx.min(value, float32(most)) if math.isfinite(most) else value
