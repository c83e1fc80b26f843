"""The gated linear recurrence of Griffin on GPUs (mlcbuild.models.recurrent.operations: `lru_gates` and `lru`)."""

from __future__ import annotations

import functools
from typing import Any

from tvm.script import tirx as T

_THREADS = 64  # of a block of channels: few, so that one sequence's channels make many blocks
_COLUMNS, _PARTS, _ROWS = 32, 8, 4  # of a gate's block: columns, among how many threads a sum is shared out, rows of x
THREADS = max(_THREADS, _COLUMNS * _PARTS)  # of the largest block


@functools.cache
def gates(heads: int, width: int) -> Any:
    """x [n, heads * width], w [heads, width in, width out], bias [heads * width] -> sigmoid(x w + bias); float32.

    A block reads a few columns of a head's matrix once for a few rows of x.
    """
    blocks, step = -(-width // _COLUMNS), -(-width // _PARTS)

    @T.prim_func(s_tir=True, private=True)
    def lru_gates(var_x: T.handle, var_w: T.handle, var_bias: T.handle, var_out: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        n = T.int32()
        x = T.match_buffer(var_x, (n, heads * width), "float32")
        w = T.match_buffer(var_w, (heads, width, width), "float32")
        bias = T.match_buffer(var_bias, (heads * width,), "float32")
        out = T.match_buffer(var_out, (n, heads * width), "float32")
        for by in T.thread_binding((n + _ROWS - 1) // _ROWS, thread="blockIdx.y"):
            for bx in T.thread_binding(heads * blocks, thread="blockIdx.x"):
                for tx in T.thread_binding(_COLUMNS * _PARTS, thread="threadIdx.x"):
                    with T.sblock("lru_gates"):
                        T.reads()
                        T.writes()
                        sums = T.sblock_alloc_buffer((_ROWS, _PARTS, _COLUMNS), "float32", scope="shared")
                        total = T.sblock_alloc_buffer((_ROWS,), "float32", scope="local")
                        own = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        head: T.let[T.int32] = bx // blocks
                        column: T.let[T.int32] = bx % blocks * _COLUMNS + tx % _COLUMNS
                        for i in range(_ROWS):
                            total[i] = T.float32(0)
                        if column < width:
                            for k in range(step):
                                at: T.let[T.int32] = tx // _COLUMNS * step + k
                                if at < width:
                                    own[0] = w[head, at, column]
                                    for i in range(_ROWS):
                                        total[i] = (
                                            total[i] + own[0] * x[T.min(by * _ROWS + i, n - 1), head * width + at]
                                        )
                        for i in range(_ROWS):
                            sums[i, tx // _COLUMNS, tx % _COLUMNS] = total[i]
                        T.tvm_storage_sync("shared")
                        row: T.let[T.int32] = by * _ROWS + tx // _COLUMNS
                        if tx < _ROWS * _COLUMNS and row < n and column < width:
                            own[0] = bias[head * width + column]
                            for i in range(_PARTS):
                                own[0] = own[0] + sums[tx // _COLUMNS, i, tx % _COLUMNS]
                            out[row, head * width + column] = T.float32(1) / (T.float32(1) + T.exp(-own[0]))

    return lru_gates


@functools.cache
def lru(width: int) -> Any:
    """x, decay [n, width], the states before [batch, width] -> out [n, width], the states after; float32."""

    @T.prim_func(s_tir=True, private=True)
    def lru(var_x: T.handle, var_decay: T.handle, var_before: T.handle, var_out: T.handle, var_after: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        n = T.int32()
        batch = T.int32()
        x = T.match_buffer(var_x, (n, width), "float32")
        decay = T.match_buffer(var_decay, (n, width), "float32")
        before = T.match_buffer(var_before, (batch, width), "float32")
        out = T.match_buffer(var_out, (n, width), "float32")
        after = T.match_buffer(var_after, (batch, width), "float32")
        for by in T.thread_binding(batch, thread="blockIdx.y"):
            for bx in T.thread_binding((width + _THREADS - 1) // _THREADS, thread="blockIdx.x"):
                for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with T.sblock("lru"):
                        T.reads()
                        T.writes()
                        state = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        c: T.let[T.int32] = bx * _THREADS + tx
                        if c < width:
                            state[0] = before[by, c]
                            for t in range(n // batch):
                                state[0] = decay[by * (n // batch) + t, c] * state[0] + x[by * (n // batch) + t, c]
                                out[by * (n // batch) + t, c] = state[0]
                            after[by, c] = state[0]

    return lru
