"""Which keys an indexer chooses, on GPUs: the lists of rows, and two sets' lists or attentions made one.

A block of threads has a row and goes through all keys of the set. A thread keeps the scores of its own keys, as whole
numbers in the same order, and the block finds the least that is chosen bit by bit, and of equal ones the last position.
So no thread reads what another one of its kernel has written, but counts in shared memory. Merging two sets' lists is
the same with their entries.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlcbuild.compiler.gpu.indexed_lists import (
    LEAST,
    SCORE_DIGITS,
    THREADS,
    digit_of,
    is_chosen,
    ordered,
    own_places,
    own_scores,
    position_of,
    score_of,
    sizes_of,
    within,
)
from mlcbuild.models.indexer import DIGITS
from mlcbuild.models.structure import Structure

_POSITION_BITS = 8 * DIGITS


@T.macro
def _sum(counts, tx, mine, total):
    """total[0] of all threads' mine[0], and total[1] of those before."""
    counts[tx] = mine[0]
    T.tvm_storage_sync("shared")
    total[0] = 0
    total[1] = 0
    for i in range(THREADS):
        total[0] = total[0] + counts[i]
        if i < tx:
            total[1] = total[1] + counts[i]
    T.tvm_storage_sync("shared")


@T.macro
def _select(keys, count, score, position, counts, tx, mine, total, least):
    """The `keys` best: above least[0], or equal to it at a position of at most least[1]; least[2] are above or equal.

    A thread has `count` of them: score(i) and position(i).
    """
    least[0] = LEAST
    for bit in range(32):
        least[2] = T.if_then_else(bit == 0, 0, least[0] + T.shift_left(1, T.min(31 - bit, 30)))
        mine[0] = 0
        for i in range(count):
            if score(i) >= least[2]:
                mine[0] = mine[0] + 1
        _sum(counts, tx, mine, total)
        if total[0] >= keys:
            least[0] = least[2]
    mine[0] = 0
    for i in range(count):
        if score(i) > least[0]:
            mine[0] = mine[0] + 1
    _sum(counts, tx, mine, total)
    least[3] = keys - total[0]
    least[1] = 0
    for bit in range(_POSITION_BITS):
        least[2] = T.bitwise_or(least[1], T.shift_left(1, _POSITION_BITS - 1 - bit))
        mine[0] = 0
        for i in range(count):
            if score(i) == least[0] and position(i) < least[2]:
                mine[0] = mine[0] + 1
        _sum(counts, tx, mine, total)
        if total[0] < least[3]:
            least[1] = least[2]


@T.macro
def _write(z, out, row, count, score, position, counts, tx, mine, total, least):
    """The list of those that are chosen: each thread's, one after the other."""
    mine[0] = 0
    for i in range(count):
        if is_chosen(score(i), position(i), least):
            mine[0] = mine[0] + 1
    _sum(counts, tx, mine, total)
    for i in range(count):
        if is_chosen(score(i), position(i), least):
            for digit in T.unroll(DIGITS):
                at = T.meta_var(DIGITS * total[1] + digit)
                out[row, z.behind(at), at % z.dim] = T.cast(
                    T.cast(digit_of(position(i) + 1, digit), "float32"), z.dtype
                )
            for digit in T.unroll(SCORE_DIGITS):
                at = T.meta_var(z.mark + 1 + SCORE_DIGITS * total[1] + digit)
                out[row, z.behind(at), at % z.dim] = T.cast(T.cast(digit_of(score(i), digit), "float32"), z.dtype)
            total[1] = total[1] + 1
    if tx == 0 and total[0] < z.it.keys:
        for digit in T.unroll(DIGITS):
            at = T.meta_var(DIGITS * total[0] + digit)
            out[row, z.behind(at), at % z.dim] = T.cast(T.float32(0), z.dtype)


@T.macro
def choose(z, source, q, out, scores, base, row, tx, own, start, length):
    """The list of a row at position `own`, of a set of `length` keys that begins at position `start`."""
    with T.sblock("choose"):
        T.reads()
        T.writes()
        counts = T.sblock_alloc_buffer((THREADS,), "int32", scope="shared")
        key = T.sblock_alloc_buffer((z.it.width,), "float32", scope="local")
        part = T.sblock_alloc_buffer((2,), "float32", scope="local")
        mine = T.sblock_alloc_buffer((1,), "int32", scope="local")
        total = T.sblock_alloc_buffer((2,), "int32", scope="local")
        least = T.sblock_alloc_buffer((4,), "int32", scope="local")
        if tx == 0:
            out[row, z.behind(z.mark), z.mark % z.dim] = T.cast(T.float32(1), z.dtype)
        if own < z.it.keys:
            if tx == 0:
                for digit in T.unroll(DIGITS):
                    out[row, z.behind(digit), digit % z.dim] = T.cast(T.float32(0), z.dtype)
        else:
            seen: T.let[T.int32] = T.max(T.min(length, own - start + 1), 0)
            count: T.let[T.int32] = (seen + THREADS - 1) // THREADS
            for i in range(count):
                at: T.let[T.int32] = i * THREADS + tx
                part[0] = T.float32(0)
                if at < seen:
                    for d in range(z.it.width):
                        key[d] = z.index_number(source, at, d)
                    for h in range(z.it.heads):
                        part[1] = T.float32(0)
                        for d in range(z.it.width):
                            part[1] = part[1] + z.index_query(q, row, h * z.it.width + d) * key[d]
                        weight = T.meta_var(z.index_query(q, row, z.it.heads * z.it.width + h))
                        part[0] = part[0] + weight * T.max(part[1], T.float32(0))
                scores[base + at] = T.if_then_else(at < seen, ordered(part[0]), LEAST)
            score = T.meta_var(own_scores(scores, base, tx))
            position = T.meta_var(own_places(start, tx))
            _select(z.it.keys, count, score, position, counts, tx, mine, total, least)
            _write(z, out, row, count, score, position, counts, tx, mine, total, least)


@T.macro
def _read(z, of, row, tx, first, score, place, ends):
    """A thread's part of a list, from `first` on; what is behind the list's end is nothing."""
    ends[tx] = z.it.keys
    for i in range(z.rounds):
        if i * THREADS + tx < z.it.keys and position_of(z, of, row, i * THREADS + tx) < 0:
            ends[tx] = T.min(ends[tx], i * THREADS + tx)
    T.tvm_storage_sync("shared")
    for i in range(z.rounds):
        place[first + i] = 0
        score[first + i] = z.it.keys
        for j in range(THREADS):
            score[first + i] = T.min(score[first + i], ends[j])
        if i * THREADS + tx < score[first + i]:
            place[first + i] = position_of(z, of, row, i * THREADS + tx)
            score[first + i] = score_of(z, of, row, i * THREADS + tx)
        else:
            score[first + i] = LEAST
    T.tvm_storage_sync("shared")


def merge(s: Structure, dtype: str) -> Any:
    """Two attentions over different keys into one, in place, or two lists: v [n, heads, dim], s [n, heads]."""
    z = sizes_of(s, dtype)
    numbers, logs = z.it.queries * z.dim, z.it.queries
    each = 2 * z.rounds

    @T.prim_func(s_tir=True, private=True)
    def attention_merge(v_: T.handle, s_: T.handle, v_other_: T.handle, s_other_: T.handle):
        T.func_attr({"tirx.is_scheduled": True})
        n = T.int32()
        v = T.match_buffer(v_, (n, z.total, z.dim), dtype)
        s = T.match_buffer(s_, (n, z.total), "float32")
        v_other = T.match_buffer(v_other_, (n, z.total, z.dim), dtype)
        s_other = T.match_buffer(s_other_, (n, z.total), "float32")
        for bx in T.thread_binding(n, thread="blockIdx.x"):
            for tx in T.thread_binding(THREADS, thread="threadIdx.x"):
                with T.sblock("merge"):
                    T.reads()
                    T.writes()
                    counts = T.sblock_alloc_buffer((THREADS,), "int32", scope="shared")
                    ends = T.sblock_alloc_buffer((THREADS,), "int32", scope="shared")
                    score = T.sblock_alloc_buffer((each,), "int32", scope="local")
                    place = T.sblock_alloc_buffer((each,), "int32", scope="local")
                    mine = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    total = T.sblock_alloc_buffer((2,), "int32", scope="local")
                    least = T.sblock_alloc_buffer((4,), "int32", scope="local")
                    share = T.sblock_alloc_buffer((3,), "float32", scope="local")
                    if T.cast(v[bx, z.behind(z.mark), z.mark % z.dim], "float32") == T.float32(1):
                        _read(z, v, bx, tx, 0, score, place, ends)
                        _read(z, v_other, bx, tx, z.rounds, score, place, ends)
                        scores = T.meta_var(within(score))
                        places = T.meta_var(within(place))
                        _select(z.it.keys, each, scores, places, counts, tx, mine, total, least)
                        _write(z, v, bx, each, scores, places, counts, tx, mine, total, least)
                    else:
                        for i in range((numbers + THREADS - 1) // THREADS):
                            at: T.let[T.int32] = i * THREADS + tx
                            if at < numbers:
                                head: T.let[T.int32] = at // z.dim
                                share[2] = T.max(s[bx, head], s_other[bx, head])
                                share[0] = T.exp2(s[bx, head] - share[2])
                                share[1] = T.exp2(s_other[bx, head] - share[2])
                                one = T.meta_var(T.cast(v[bx, head, at % z.dim], "float32"))
                                other = T.meta_var(T.cast(v_other[bx, head, at % z.dim], "float32"))
                                v[bx, head, at % z.dim] = T.cast(
                                    (one * share[0] + other * share[1]) / (share[0] + share[1]), dtype
                                )
                        T.tvm_storage_sync("shared")
                        for i in range((logs + THREADS - 1) // THREADS):
                            at: T.let[T.int32] = i * THREADS + tx
                            if at < logs:
                                share[2] = T.max(s[bx, at], s_other[bx, at])
                                share[0] = T.exp2(s[bx, at] - share[2]) + T.exp2(s_other[bx, at] - share[2])
                                s[bx, at] = T.log2(share[0]) + share[2]

    return attention_merge
