"""The gated delta rule on GPUs (mlcbuild.models.recurrent.operations: `delta`).

The columns of a head's state do not depend on each other (mlcbuild.compiler.gpu.memories has how they are shared out).
With s the state after it has faded, and q and k of length 1, one pass over s gives all that the parts of a block have
to tell each other:

    change = beta (v - s^T k)      out = s^T q + (k . q) change      s becomes s + k change^T

So there is one barrier for each token: parts write what they have into the half of a table that is not being read.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from tvm.script import tirx as T

from mlcbuild.compiler.gpu.memories import COLUMNS, load_pairs, load_state, sharing, store_state
from mlcbuild.models.recurrent.operations import Scanned

_TINY = 1e-6  # added to squared lengths, as transformers does


@functools.cache
def delta(s: Scanned) -> Any:
    """x [n, 2 * groups * size + heads * dim], decay [n, heads * each], beta [n, heads], the states before
    [batch, heads * size * dim] -> out [n, heads * dim], the states after; all float32.
    """
    size, dim, heads, groups, each = s.size, s.dim, s.heads, s.groups, s.each
    shares = sharing(size)
    parts, rows, padded = shares.parts, shares.rows, shares.padded
    ahead, threads = shares.ahead, shares.threads
    blocks = -(-dim // COLUMNS)
    width, shared, scale = 2 * groups * size + heads * dim, heads // groups, 1 / math.sqrt(size)
    fading = padded if each else 1  # decays that a token has in a head

    @T.prim_func(s_tir=True, private=True)
    def delta(
        var_x: T.handle, var_decay: T.handle, var_beta: T.handle, var_before: T.handle, var_out: T.handle,
        var_after: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        n = T.int32()
        batch = T.int32()
        x = T.match_buffer(var_x, (n, width), "float32")
        decay = T.match_buffer(var_decay, (n, heads * size if each else heads), "float32")
        beta = T.match_buffer(var_beta, (n, heads), "float32")
        before = T.match_buffer(var_before, (batch, heads * size * dim), "float32")
        out = T.match_buffer(var_out, (n, heads * dim), "float32")
        after = T.match_buffer(var_after, (batch, heads * size * dim), "float32")
        for by in T.thread_binding(batch * heads, thread="blockIdx.y"):
            for bx in T.thread_binding(blocks, thread="blockIdx.x"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("delta"):
                        T.reads()
                        T.writes()
                        # Of each token the head's query and key, and how each of its rows fades.
                        pair = T.sblock_alloc_buffer((ahead, 2, padded), "float32", scope="shared")
                        fade = T.sblock_alloc_buffer((ahead, fading), "float32", scope="shared")
                        # Of each part: q . q, k . k and q . k of a token; s^T k and s^T q of a column, twice.
                        lengths = T.sblock_alloc_buffer((ahead, 3, parts), "float32", scope="shared")
                        sums = T.sblock_alloc_buffer((2, parts, 2, COLUMNS), "float32", scope="shared")
                        state = T.sblock_alloc_buffer((rows,), "float32", scope="local")
                        own = T.sblock_alloc_buffer((6,), "float32", scope="local")  # sums, as they come
                        column: T.let[T.int32] = bx * COLUMNS + tx % COLUMNS
                        part: T.let[T.int32] = tx // COLUMNS
                        head: T.let[T.int32] = by % heads
                        keys: T.let[T.int32] = head // shared  # the group whose queries and keys it has
                        first: T.let[T.int32] = by // heads * (n // batch)  # token of the sequence
                        load_state(state, before, by // heads, head, part, column, dim, size, rows)
                        for chunk in range((n // batch + ahead - 1) // ahead):
                            T.tvm_storage_sync("shared")
                            load_pairs(
                                pair, x, first, chunk, n // batch, keys, groups, tx, size, padded, ahead, threads
                            )
                            for turn in range((ahead * fading + threads - 1) // threads):
                                at: T.let[T.int32] = turn * threads + tx
                                if at < ahead * fading:
                                    fade[at // fading, at % fading] = T.float32(0)
                                    if chunk * ahead + at // fading < n // batch and at % fading < size:
                                        fade[at // fading, at % fading] = decay[
                                            first + chunk * ahead + at // fading,
                                            head * size + at % fading if each else head,
                                        ]
                            T.tvm_storage_sync("shared")
                            for turn in range((ahead * 3 * parts + threads - 1) // threads):
                                at: T.let[T.int32] = turn * threads + tx
                                one: T.let[T.int32] = at // parts % 3 % 2  # 0, 1, 0
                                other: T.let[T.int32] = (at // parts % 3 + 1) // 2  # 0, 1, 1
                                if at < ahead * 3 * parts:
                                    own[0] = T.float32(0)
                                    for i in range(rows):
                                        own[0] = own[0] + (
                                            pair[at // (3 * parts), one, at % parts * rows + i]
                                            * pair[at // (3 * parts), other, at % parts * rows + i]
                                        )
                                    lengths[at // (3 * parts), at // parts % 3, at % parts] = own[0]
                            T.tvm_storage_sync("shared")
                            for t in range(T.min(ahead, n // batch - chunk * ahead)):
                                own[0] = T.float32(0)
                                own[1] = T.float32(0)
                                for i in range(rows):
                                    state[i] = state[i] * fade[t, part * rows + i if each else 0]
                                    own[0] = own[0] + state[i] * pair[t, 1, part * rows + i]
                                    own[1] = own[1] + state[i] * pair[t, 0, part * rows + i]
                                sums[t % 2, part, 0, tx % COLUMNS] = own[0]
                                sums[t % 2, part, 1, tx % COLUMNS] = own[1]
                                for i in range(5):
                                    own[i] = T.float32(0)
                                for i in range(parts):
                                    own[0] = own[0] + lengths[t, 0, i]
                                    own[1] = own[1] + lengths[t, 1, i]
                                    own[2] = own[2] + lengths[t, 2, i]
                                own[0] = T.float32(scale) / T.sqrt(own[0] + T.float32(_TINY))
                                own[1] = T.float32(1) / T.sqrt(own[1] + T.float32(_TINY))
                                T.tvm_storage_sync("shared")
                                for i in range(parts):
                                    own[3] = own[3] + sums[t % 2, i, 0, tx % COLUMNS]
                                    own[4] = own[4] + sums[t % 2, i, 1, tx % COLUMNS]
                                own[5] = T.float32(0)
                                if column < dim:
                                    own[5] = beta[first + chunk * ahead + t, head] * (
                                        x[first + chunk * ahead + t, 2 * groups * size + head * dim + column]
                                        - own[1] * own[3]
                                    )
                                    if part == 0:
                                        out[first + chunk * ahead + t, head * dim + column] = own[0] * (
                                            own[4] + own[2] * own[1] * own[5]
                                        )
                                own[5] = own[5] * own[1]
                                for i in range(rows):
                                    state[i] = state[i] + pair[t, 1, part * rows + i] * own[5]
                        store_state(state, after, by // heads, head, part, column, dim, size, rows)

    return delta
