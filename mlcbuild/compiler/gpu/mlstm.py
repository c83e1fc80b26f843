"""The matrix memory of xLSTM on GPUs (mlcbuild.models.recurrent.operations: `mlstm`).

Columns are shared out as mlcbuild.compiler.gpu.memories has it. Each thread finds the largest exponent and both gates
anew. There is one barrier for each token: parts write their sums into the half of a table that is not being read.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from tvm.script import tirx as T

from mlcbuild.compiler.gpu.memories import COLUMNS, load_pairs, load_state, sharing, store_state
from mlcbuild.models.recurrent.operations import MLSTM_EPS, Scanned


@functools.cache
def mlstm(s: Scanned) -> Any:
    """x [n, heads * (2 * size + dim)], gates [n, 2 * heads], the memories [batch, heads * size * (dim + 1)] and largest
    exponents [batch, heads] before -> out [n, heads * (dim + 1)], both after; all float32.
    """
    size, dim, heads, columns = s.size, s.dim, s.heads, s.dim + 1
    shares = sharing(size)
    parts, rows, padded = shares.parts, shares.rows, shares.padded
    ahead, threads = shares.ahead, shares.threads
    blocks = -(-columns // COLUMNS)
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
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("mlstm"):
                        T.reads()
                        T.writes()
                        pair = T.sblock_alloc_buffer((ahead, 2, padded), "float32", scope="shared")  # query and key
                        sums = T.sblock_alloc_buffer((2, parts, COLUMNS), "float32", scope="shared")
                        state = T.sblock_alloc_buffer((rows,), "float32", scope="local")
                        own = T.sblock_alloc_buffer((5,), "float32", scope="local")  # top, kept, added, sum, exponent
                        column: T.let[T.int32] = bx * COLUMNS + tx % COLUMNS
                        part: T.let[T.int32] = tx // COLUMNS
                        head: T.let[T.int32] = by % heads
                        first: T.let[T.int32] = by // heads * (n // batch)  # token of the sequence
                        own[0] = top[by // heads, head]
                        load_state(state, before, by // heads, head, part, column, columns, size, rows)
                        for chunk in range((n // batch + ahead - 1) // ahead):
                            T.tvm_storage_sync("shared")
                            load_pairs(pair, x, first, chunk, n // batch, head, heads, tx, size, padded, ahead, threads)
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
                                sums[t % 2, part, tx % COLUMNS] = own[3]
                                T.tvm_storage_sync("shared")
                                if part == 0 and column < columns:
                                    own[3] = T.float32(0)
                                    for i in range(parts):
                                        own[3] = own[3] + sums[t % 2, i, tx % COLUMNS]
                                    own[3] = own[3] * T.float32(scale)
                                    if column == dim:
                                        own[3] = T.max(T.abs(own[3]), T.exp(-own[0])) + T.float32(MLSTM_EPS)
                                    out[first + chunk * ahead + t, head * columns + column] = own[3]
                        store_state(state, after, by // heads, head, part, column, columns, size, rows)
                        if bx == 0 and tx == 0:
                            top_after[by // heads, head] = own[0]

    return mlstm
