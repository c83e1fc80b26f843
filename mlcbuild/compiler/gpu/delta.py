"""The gated delta rule on GPUs (mlcbuild.models.recurrent.operations: `delta`), a chunk of tokens at once.

The columns of a head's state do not depend on each other (mlcbuild.compiler.gpu.memories has how they are shared out).
The formulas are those of the CPU's kernel (cpu/kernels/delta.c). The products of a chunk's keys and queries are
shared out among all threads. Then each part of a block asks its rows of the state for all tokens, of which none waits
for another, and behind a barrier every thread has its column's changes, one after the other, and writes all of them to
its rows. So there are four barriers for a chunk, five where rows fade by themselves. Queries and keys stay as they
are: what brings them to length 1 is multiplied with what they give.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from tvm.script import tirx as T

from mlcbuild.compiler.gpu.memories import COLUMNS, load_pairs, load_state, sharing, store_state
from mlcbuild.models.recurrent.operations import Scanned

_TINY = 1e-6  # added to squared lengths, as transformers does


@T.macro
def _ask(own, state, pair, token, start, rows):
    """What a thread's rows have for a token's key and for its query, in two sums each: none waits for itself."""
    for k in range(4):
        own[k] = T.float32(0)
    for r in range(rows // 2):
        own[0] = own[0] + state[r] * pair[token, 1, start + r]
        own[1] = own[1] + state[r] * pair[token, 0, start + r]
        own[2] = own[2] + state[rows // 2 + r] * pair[token, 1, start + rows // 2 + r]
        own[3] = own[3] + state[rows // 2 + r] * pair[token, 0, start + rows // 2 + r]
    if rows % 2 == 1:
        own[0] = own[0] + state[rows - 1] * pair[token, 1, start + rows - 1]
        own[1] = own[1] + state[rows - 1] * pair[token, 0, start + rows - 1]


@functools.cache
def delta(s: Scanned) -> Any:
    """x [n, 2 * groups * size + heads * dim], decay [n, heads * each], beta [n, heads], the states before
    [batch, heads * size * dim] -> out [n, heads * dim], the states after; all float32.
    """
    size, dim, heads, groups, each = s.size, s.dim, s.heads, s.groups, s.each
    shares = sharing(size)
    parts, rows, ahead, threads = shares.parts, shares.rows, shares.ahead, shares.threads
    blocks, pairs = -(-dim // COLUMNS), ahead * ahead
    width, shared, scale = 2 * groups * size + heads * dim, heads // groups, 1 / math.sqrt(size)
    fading = threads if each else 1  # decays that a token has in a head

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
                        # Of each token the head's query, in whose place its changes come, and key; how rows fade.
                        pair = T.sblock_alloc_buffer((ahead, 2, threads), "float32", scope="shared")
                        fade = T.sblock_alloc_buffer((ahead, fading), "float32", scope="shared")
                        left = T.sblock_alloc_buffer((fading,), "float32", scope="shared")  # of a row, behind the chunk
                        value = T.sblock_alloc_buffer((ahead, COLUMNS), "float32", scope="shared")
                        # Of each part: the products of a token's key and query with a key before, and q . q.
                        dots = T.sblock_alloc_buffer((2, ahead, ahead, parts), "float32", scope="shared")
                        squares = T.sblock_alloc_buffer((ahead, parts), "float32", scope="shared")
                        # What a change takes of one before, and what is read of it. By what a token's value, what the
                        # state has for its key and for its query, and its change are multiplied.
                        met = T.sblock_alloc_buffer((2, ahead, ahead), "float32", scope="shared")
                        counts = T.sblock_alloc_buffer((4, ahead), "float32", scope="shared")
                        sums = T.sblock_alloc_buffer((ahead, 2, parts, COLUMNS), "float32", scope="shared")
                        state = T.sblock_alloc_buffer((rows,), "float32", scope="local")
                        own = T.sblock_alloc_buffer((6,), "float32", scope="local")  # sums, as they come
                        column: T.let[T.int32] = bx * COLUMNS + tx % COLUMNS
                        part: T.let[T.int32] = tx // COLUMNS
                        head: T.let[T.int32] = by % heads
                        keys: T.let[T.int32] = head // shared  # the group whose queries and keys it has
                        load_state(state, before, by // heads, head, part, column, dim, size, rows)
                        for chunk in range((n // batch + ahead - 1) // ahead):
                            first: T.let[T.int32] = by // heads * (n // batch) + chunk * ahead
                            held: T.let[T.int32] = T.min(ahead, n // batch - chunk * ahead)
                            T.tvm_storage_sync("shared")
                            load_pairs(pair, x, first, 0, held, keys, groups, tx, size, threads, ahead, threads)
                            for turn in range((ahead * fading + threads - 1) // threads):
                                at: T.let[T.int32] = turn * threads + tx
                                if at < ahead * fading:
                                    fade[at // fading, at % fading] = T.float32(1)
                                    if at // fading < held and at % fading < size:
                                        fade[at // fading, at % fading] = decay[
                                            first + at // fading, head * size + at % fading if each else head
                                        ]
                            for turn in range((ahead + parts - 1) // parts):
                                if turn * parts + part < held and column < dim:
                                    value[turn * parts + part, tx % COLUMNS] = x[
                                        first + turn * parts + part, 2 * groups * size + head * dim + column
                                    ]
                            T.tvm_storage_sync("shared")
                            for turn in range((pairs * parts + threads - 1) // threads):
                                at: T.let[T.int32] = turn * threads + tx
                                i: T.let[T.int32] = at // parts // ahead
                                j: T.let[T.int32] = at // parts % ahead
                                if at < pairs * parts and j <= i and i < held:
                                    for k in range(3):
                                        own[k] = T.float32(0)
                                    for r in range(rows):
                                        # Threads begin at different rows, which lie in different banks.
                                        row: T.let[T.int32] = at % parts * rows + (r + tx) % rows
                                        own[3] = pair[j, 1, row]
                                        if each:
                                            for t in range(i - j):
                                                own[3] = own[3] * fade[j + 1 + t, row]
                                        own[0] = own[0] + own[3] * pair[i, 1, row]
                                        own[1] = own[1] + own[3] * pair[i, 0, row]
                                        own[2] = own[2] + pair[i, 0, row] * pair[i, 0, row]
                                    dots[0, i, j, at % parts] = own[0]
                                    dots[1, i, j, at % parts] = own[1]
                                    if i == j:
                                        squares[i, at % parts] = own[2]
                            T.tvm_storage_sync("shared")
                            for turn in range((pairs + threads - 1) // threads):
                                at: T.let[T.int32] = turn * threads + tx
                                i: T.let[T.int32] = at // ahead
                                j: T.let[T.int32] = at % ahead
                                if at < pairs and j <= i and i < held:
                                    for k in range(5):
                                        own[k] = T.float32(0)
                                    for k in range(parts):
                                        own[0] = own[0] + dots[0, i, j, k]
                                        own[1] = own[1] + dots[1, i, j, k]
                                        own[2] = own[2] + dots[0, i, i, k]
                                        own[3] = own[3] + dots[0, j, j, k]
                                        own[4] = own[4] + squares[i, k]
                                    own[2] = T.float32(1) / T.sqrt(own[2] + T.float32(_TINY))
                                    own[3] = T.float32(1) / T.sqrt(own[3] + T.float32(_TINY))
                                    own[4] = T.float32(scale) / T.sqrt(own[4] + T.float32(_TINY))
                                    own[5] = T.float32(1)
                                    if not each:
                                        for t in range(i - j):
                                            own[5] = own[5] * fade[j + 1 + t, 0]
                                    own[3] = own[3] * own[5]
                                    met[0, i, j] = beta[first + i, head] * own[2] * own[3] * own[0]
                                    met[1, i, j] = own[4] * own[3] * own[1]
                                    if i == j:
                                        own[0] = T.float32(1)
                                        own[1] = T.float32(1)
                                        if not each:
                                            for t in range(i + 1):
                                                own[0] = own[0] * fade[t, 0]
                                            for t in range(held - 1 - i):
                                                own[1] = own[1] * fade[i + 1 + t, 0]
                                        counts[0, i] = beta[first + i, head]
                                        counts[1, i] = beta[first + i, head] * own[2] * own[0]
                                        counts[2, i] = own[4] * own[0]
                                        counts[3, i] = own[2] * own[1]
                            if each:
                                # Keys and queries fade as the state does until them, keys in `fade` as from them on.
                                own[0] = T.float32(1)
                                for i in range(held):
                                    own[1] = fade[i, tx]
                                    own[0] = own[0] * own[1]
                                    for j in range(i):
                                        fade[j, tx] = fade[j, tx] * own[1]
                                    fade[i, tx] = pair[i, 1, tx]
                                    pair[i, 1, tx] = pair[i, 1, tx] * own[0]
                                    pair[i, 0, tx] = pair[i, 0, tx] * own[0]
                                left[tx] = own[0]
                                T.tvm_storage_sync("shared")
                            for t in range(held):
                                _ask(own, state, pair, t, part * rows, rows)
                                sums[t, 0, part, tx % COLUMNS] = own[0] + own[2]
                                sums[t, 1, part, tx % COLUMNS] = own[1] + own[3]
                            T.tvm_storage_sync("shared")
                            for i in range(held):
                                own[0] = T.float32(0)
                                own[1] = T.float32(0)
                                for k in range(parts):
                                    own[0] = own[0] + sums[i, 0, k, tx % COLUMNS]
                                    own[1] = own[1] + sums[i, 1, k, tx % COLUMNS]
                                own[0] = counts[0, i] * value[i, tx % COLUMNS] - counts[1, i] * own[0]
                                own[1] = counts[2, i] * own[1]
                                for j in range(i):
                                    own[0] = own[0] - met[0, i, j] * pair[j, 0, tx]
                                    own[1] = own[1] + met[1, i, j] * pair[j, 0, tx]
                                pair[i, 0, tx] = own[0]
                                if part == 0 and column < dim:
                                    out[first + i, head * dim + column] = own[1] + met[1, i, i] * own[0]
                            own[0] = T.float32(1)
                            if not each:
                                for t in range(held):
                                    own[0] = own[0] * fade[t, 0]
                            for r in range(rows):
                                state[r] = state[r] * (left[part * rows + r] if each else own[0])
                            for t in range(held):
                                own[0] = pair[t, 0, tx] * counts[3, t]
                                for r in range(rows):
                                    state[r] = state[r] + own[0] * (
                                        fade[t, part * rows + r] if each else pair[t, 1, part * rows + r]
                                    )
                        store_state(state, after, by // heads, head, part, column, dim, size, rows)

    return delta
