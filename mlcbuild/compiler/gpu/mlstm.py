"""The matrix memory of xLSTM on GPUs (mlcbuild.models.recurrent.operations: `mlstm`).

As of delta nets (mlcbuild.compiler.gpu.delta), a block has some columns of a head's memory; a column's rows are shared
out among the parts of a block, and stay in a thread's registers from the first token to the last. Each thread finds the
largest exponent and both gates anew. There is one barrier for each token: parts write their sums into the half of a
table that is not being read.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from tvm.script import tirx as T

from mlcbuild.compiler.gpu.delta import threads
from mlcbuild.models.recurrent.operations import MLSTM_EPS, Scanned

_COLUMNS = 32  # of a block
_AHEAD, _KEPT = 8, 2048  # tokens whose keys and queries a block has at a time: so many, or fewer with so many numbers


@functools.cache
def mlstm(s: Scanned) -> Any:
    """x [n, heads * (2 * size + dim)], gates [n, 2 * heads], the memories [batch, heads * size * (dim + 1)] and largest
    exponents [batch, heads] before -> out [n, heads * (dim + 1)], both after; all float32.
    """
    size, dim, heads, columns = s.size, s.dim, s.heads, s.dim + 1
    many = threads(size)
    parts = many // _COLUMNS
    rows = -(-size // parts)
    padded, blocks = parts * rows, -(-columns // _COLUMNS)
    ahead = max(1, min(_AHEAD, _KEPT // (2 * padded)))
    width, scale = heads * (2 * size + dim), 1 / math.sqrt(size)

    @T.prim_func(s_tir=True, private=True)
    def mlstm(
        var_x: T.handle, var_gates: T.handle, var_before: T.handle, var_top: T.handle, var_out: T.handle,
        var_after: T.handle, var_top_after: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        n = T.int32()
        batch = T.int32()
        x = T.match_buffer(var_x, (n, width), "float32")
        gates = T.match_buffer(var_gates, (n, 2 * heads), "float32")
        before = T.match_buffer(var_before, (batch, heads * size * columns), "float32")
        top = T.match_buffer(var_top, (batch, heads), "float32")
        out = T.match_buffer(var_out, (n, heads * columns), "float32")
        after = T.match_buffer(var_after, (batch, heads * size * columns), "float32")
        top_after = T.match_buffer(var_top_after, (batch, heads), "float32")
        for by in T.thread_binding(batch * heads, thread="blockIdx.y"):
            for bx in T.thread_binding(blocks, thread="blockIdx.x"):
                for tx in T.thread_binding(many, thread="threadIdx.x"):
                    with T.sblock("mlstm"):
                        T.reads()
                        T.writes()
                        pair = T.sblock_alloc_buffer((ahead, 2, padded), "float32", scope="shared")  # query and key
                        sums = T.sblock_alloc_buffer((2, parts, _COLUMNS), "float32", scope="shared")
                        state = T.sblock_alloc_buffer((rows,), "float32", scope="local")
                        own = T.sblock_alloc_buffer((5,), "float32", scope="local")  # top, kept, added, sum, exponent
                        column: T.let[T.int32] = bx * _COLUMNS + tx % _COLUMNS
                        part: T.let[T.int32] = tx // _COLUMNS
                        head: T.let[T.int32] = by % heads
                        first: T.let[T.int32] = by // heads * (n // batch)  # token of the sequence
                        own[0] = top[by // heads, head]
                        for i in range(rows):
                            state[i] = T.float32(0)
                            if part * rows + i < size and column < columns:
                                state[i] = before[by // heads, (head * size + part * rows + i) * columns + column]
                        for chunk in range((n // batch + ahead - 1) // ahead):
                            T.tvm_storage_sync("shared")
                            for turn in range((ahead * 2 * padded + many - 1) // many):
                                at: T.let[T.int32] = turn * many + tx
                                token: T.let[T.int32] = chunk * ahead + at // (2 * padded)
                                row: T.let[T.int32] = at % padded
                                if at < ahead * 2 * padded:
                                    pair[at // (2 * padded), at // padded % 2, row] = T.float32(0)
                                    if token < n // batch and row < size:
                                        pair[at // (2 * padded), at // padded % 2, row] = x[
                                            first + token, (at // padded % 2 * heads + head) * size + row
                                        ]
                            T.tvm_storage_sync("shared")
                            for t in range(T.min(ahead, n // batch - chunk * ahead)):
                                own[4] = own[0] + gates[first + chunk * ahead + t, heads + head]
                                own[2] = gates[first + chunk * ahead + t, head]
                                own[0] = T.max(own[4], own[2])
                                own[1] = T.exp(own[4] - own[0])
                                own[2] = T.exp(own[2] - own[0])
                                if column < dim:
                                    own[2] = (
                                        own[2] * x[first + chunk * ahead + t, 2 * heads * size + head * dim + column]
                                    )
                                own[3] = T.float32(0)
                                for i in range(rows):
                                    state[i] = own[1] * state[i] + pair[t, 1, part * rows + i] * own[2]
                                    own[3] = own[3] + state[i] * pair[t, 0, part * rows + i]
                                sums[t % 2, part, tx % _COLUMNS] = own[3]
                                T.tvm_storage_sync("shared")
                                if part == 0 and column < columns:
                                    own[3] = T.float32(0)
                                    for i in range(parts):
                                        own[3] = own[3] + sums[t % 2, i, tx % _COLUMNS]
                                    own[3] = own[3] * T.float32(scale)
                                    if column == dim:
                                        own[3] = T.max(T.abs(own[3]), T.exp(-own[0])) + T.float32(MLSTM_EPS)
                                    out[first + chunk * ahead + t, head * columns + column] = own[3]
                        for i in range(rows):
                            if part * rows + i < size and column < columns:
                                after[by // heads, (head * size + part * rows + i) * columns + column] = state[i]
                        if bx == 0 and tx == 0:
                            top_after[by // heads, head] = own[0]

    return mlstm
