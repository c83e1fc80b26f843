"""Attention to the keys that an indexer chooses (mlcbuild.models.indexer has the heads and the lists), on any GPU.

A call of scale 0 chooses, by a kernel of its own: a block of threads has a row and goes through all keys of the set. A
thread keeps the scores of its own keys, as whole numbers in the same order, and the block finds the least that is
chosen bit by bit, and of equal ones the last position. So no thread reads what another one of its kernel has written,
but counts in shared memory. Merging two sets' lists is the same with their entries. The number behind the list is 1 in
such rows, and behind that are the scores, four digits to each.

Attention has a block of threads for a row and some heads: every key that is chosen, or all, by one thread, and then the
columns of values. These are simple kernels: each block reads its keys for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from mlcbuild.compiler.gpu.rows import float32
from mlcbuild.models.indexer import DIGITS, Indexer, indexer_of
from mlcbuild.models.structure import Structure

_THREADS = 128
_AT_ONCE = 128  # rows for which keys are chosen, each with a score for every key
_GROUP = 4  # heads of a block that share a key
_PAGE = 16
_NONE, _LOG2E = -5e4, 1.4426950408889634
_LEAST = 1 - (1 << 31)  # of what is ordered: no score's
_POSITION_BITS = 8 * DIGITS
_SCORE_DIGITS = 4

Source = Callable[[Any, Any, Any, Any], Any]  # (0 key or 1 value, head, place in the set, number) -> what is there


@dataclass(frozen=True)
class Sizes:
    """Of the kernels for a structure: `heads` of the model's, `group` of them to a block and `each` to a head of keys;
    `used` numbers of a key are multiplied, `summed` of a value; `total` heads of queries and `stored` ones of keys,
    `dim` wide, are in the cache.
    """

    it: Indexer
    heads: int
    group: int
    each: int
    used: int
    summed: int
    joined: bool
    total: int
    stored: int
    dim: int
    window: int | None
    sinks: bool
    dtype: str

    @property
    def columns(self) -> int:
        return -(-self.summed // _THREADS)

    @property
    def no_sinks(self) -> int:
        """What takes every row's own key out of a set."""
        return 0 if self.sinks else -(1 << 30)

    @property
    def mark(self) -> int:
        """The number behind the model's heads that is 1 in rows of a call that chooses, and 0 in others."""
        return DIGITS * self.it.keys

    @property
    def rounds(self) -> int:
        """In which a block's threads go through a list."""
        return -(-self.it.keys // _THREADS)

    def behind(self, at: Any) -> Any:
        """The head of the `at`-th number behind the model's heads of queries; it is number at % dim there."""
        return self.it.queries + at // self.dim

    def number(self, source: Source, head: Any, place: Any, at: Any, value: bool) -> Any:
        """The `at`-th number of a head's key or value, float32."""
        if self.joined:
            found = source(at // self.dim, 0, place, at % self.dim)
        else:
            found = source(int(value), head // self.each, place, at)
        return found.astype("float32")

    def index_number(self, source: Source, place: Any, at: Any) -> Any:
        at = at + self.it.at
        return source(at // self.dim, self.it.key_head, place, at % self.dim).astype("float32")

    def query_number(self, q: Any, row: Any, head: Any, at: Any) -> Any:
        if self.joined:
            return q[row, 2 * head + at // self.dim, at % self.dim].astype("float32")
        return q[row, head, at].astype("float32")

    def index_query(self, q: Any, row: Any, at: Any) -> Any:
        return q[row, self.behind(at), at % self.dim].astype("float32")

    def first_seen(self, scale: Any, back: Any) -> Any:
        if self.window is None:
            return tirx.const(0, "int32")
        return tirx.if_then_else(scale < float32(0), tirx.max(back - self.window + 1, 0), 0)


def sizes_of(s: Structure, dtype: str) -> Sizes:
    it, (total, stored, dim) = indexer_of(s), s.cache_heads
    heads, joined = s.num_attention_heads, s.absorbed
    group = next(n for n in range(_GROUP, 0, -1) if heads % n == 0) if joined else 1
    used = s.kv_lora_rank + (s.rotary_dim or 0) if joined else dim
    summed = s.kv_lora_rank if joined else dim
    each = heads // s.num_key_value_heads
    window, sinks = s.sliding_window_size, "sinks" in s.roles()
    return Sizes(it, heads, group, each, used, summed, joined, total, stored, dim, window, sinks, dtype)


def ordered(score: Any) -> Any:
    """A whole number of 32 bits, in the order of scores."""
    score = tirx.if_then_else(score == float32(0), float32(0), score)  # no -0
    bits = tirx.reinterpret("int32", score)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _digit(number: Any, digit: Any) -> Any:
    return (number >> (8 * digit)) & 255


def _whole(value: Any) -> Any:
    return value.astype("float32").astype("int32")


def _position(z: Sizes, of: Any, row: Any, at: Any) -> Any:
    """The `at`-th position of a row's list; -1 at its end."""
    found = tirx.const(-1, "int32")
    for digit in range(DIGITS):
        place = DIGITS * at + digit
        found = found + (_whole(of[row, z.behind(place), place % z.dim]) << (8 * digit))
    return found


def _score(z: Sizes, of: Any, row: Any, at: Any) -> Any:
    found = tirx.const(0, "int32")
    for digit in range(_SCORE_DIGITS):
        place = z.mark + 1 + _SCORE_DIGITS * at + digit
        found = found | (_whole(of[row, z.behind(place), place % z.dim]) << (8 * digit))
    return found


def _rows_of(buffer: Any, first: Any) -> Source:
    """Keys and values [n, heads, dim] of new tokens, of which the set's first is `first`."""
    keys, values = buffer

    def number(side: Any, head: Any, place: Any, at: Any) -> Any:
        if isinstance(side, int):
            return (keys, values)[side][first + place, head, at]
        return tirx.if_then_else(side == 0, keys[first + place, head, at], values[first + place, head, at])

    return number


def _pages_of(pages: Any, numbers: Any, first: Any) -> Source:
    """Those in pages [pages, 2, heads, 16, dim], which are the set's from `numbers[first]` on."""
    return lambda side, head, place, at: pages[numbers[first + place // _PAGE], side, head, place % _PAGE, at]


def _own_scores(scores: Any, base: Any, tx: Any) -> Callable[[Any], Any]:
    return lambda i: scores[base + i * _THREADS + tx]


def _own_places(start: Any, tx: Any) -> Callable[[Any], Any]:
    return lambda i: start + i * _THREADS + tx


def _of(buffer: Any) -> Callable[[Any], Any]:
    return lambda i: buffer[i]


def _is_chosen(score: Any, position: Any, least: Any) -> Any:
    equal = tirx.all(score == least[0], score != tirx.const(_LEAST, "int32"), position <= least[1])
    return tirx.any(score > least[0], equal)


@T.macro
def _sum(counts, tx, mine, total):
    """total[0] of all threads' mine[0], and total[1] of those before."""
    counts[tx] = mine[0]
    T.tvm_storage_sync("shared")
    total[0] = 0
    total[1] = 0
    for i in range(_THREADS):
        total[0] = total[0] + counts[i]
        if i < tx:
            total[1] = total[1] + counts[i]
    T.tvm_storage_sync("shared")


@T.macro
def _select(keys, count, score, position, counts, tx, mine, total, least):
    """The `keys` best: above least[0], or equal to it at a position of at most least[1]; least[2] are above or equal.

    A thread has `count` of them: score(i) and position(i).
    """
    least[0] = _LEAST
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
        if _is_chosen(score(i), position(i), least):
            mine[0] = mine[0] + 1
    _sum(counts, tx, mine, total)
    for i in range(count):
        if _is_chosen(score(i), position(i), least):
            for digit in T.unroll(DIGITS):
                at = T.meta_var(DIGITS * total[1] + digit)
                out[row, z.behind(at), at % z.dim] = T.cast(T.cast(_digit(position(i) + 1, digit), "float32"), z.dtype)
            for digit in T.unroll(_SCORE_DIGITS):
                at = T.meta_var(z.mark + 1 + _SCORE_DIGITS * total[1] + digit)
                out[row, z.behind(at), at % z.dim] = T.cast(T.cast(_digit(score(i), digit), "float32"), z.dtype)
            total[1] = total[1] + 1
    if tx == 0 and total[0] < z.it.keys:
        for digit in T.unroll(DIGITS):
            at = T.meta_var(DIGITS * total[0] + digit)
            out[row, z.behind(at), at % z.dim] = T.cast(T.float32(0), z.dtype)


@T.macro
def _choose(z, source, q, out, scores, base, row, tx, own, start, length):
    """The list of a row at position `own`, of a set of `length` keys that begins at position `start`."""
    with T.sblock("choose"):
        T.reads()
        T.writes()
        counts = T.sblock_alloc_buffer((_THREADS,), "int32", scope="shared")
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
            count: T.let[T.int32] = (seen + _THREADS - 1) // _THREADS
            for i in range(count):
                at: T.let[T.int32] = i * _THREADS + tx
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
                scores[base + at] = T.if_then_else(at < seen, ordered(part[0]), _LEAST)
            score = T.meta_var(_own_scores(scores, base, tx))
            position = T.meta_var(_own_places(start, tx))
            _select(z.it.keys, count, score, position, counts, tx, mine, total, least)
            _write(z, out, row, count, score, position, counts, tx, mine, total, least)


@T.macro
def _attend(z, source, q, out, lse, row, first_head, tx, own, start, length, scale):
    """A row's heads from `first_head` on: over the keys of its list that are in the set, or all."""
    with T.sblock("attend"):
        T.reads()
        T.writes()
        query = T.sblock_alloc_buffer((z.group * z.used,), "float32", scope="shared")
        weights = T.sblock_alloc_buffer((z.group * _THREADS,), "float32", scope="shared")
        places = T.sblock_alloc_buffer((_THREADS,), "int32", scope="shared")
        part = T.sblock_alloc_buffer((z.group,), "float32", scope="local")
        most = T.sblock_alloc_buffer((z.group,), "float32", scope="local")
        whole = T.sblock_alloc_buffer((z.group,), "float32", scope="local")
        sums = T.sblock_alloc_buffer((z.group * z.columns,), "float32", scope="local")
        one = T.sblock_alloc_buffer((2,), "float32", scope="local")
        place = T.sblock_alloc_buffer((1,), "int32", scope="local")
        back: T.let[T.int32] = own - start
        seen: T.let[T.int32] = T.min(length, back + 1)
        first: T.let[T.int32] = z.first_seen(scale, back)
        listed: T.let[T.int32] = T.if_then_else(_position(z, q, row, 0) >= 0, 1, 0)
        steps: T.let[T.int32] = T.if_then_else(
            listed == 1, z.rounds, (T.max(seen - first, 0) + _THREADS - 1) // _THREADS
        )
        for i in range((z.group * z.used + _THREADS - 1) // _THREADS):
            at: T.let[T.int32] = i * _THREADS + tx
            if at < z.group * z.used:
                query[at] = z.query_number(q, row, first_head + at // z.used, at % z.used) * (
                    T.abs(scale) * T.float32(_LOG2E)
                )
        for g in T.unroll(z.group):
            most[g] = T.float32(_NONE)
            whole[g] = T.float32(0)
            for c in T.unroll(z.columns):
                sums[g * z.columns + c] = T.float32(0)
            if back < length + z.no_sinks:
                one[0] = z.query_number(q, row, first_head + g, z.dim - 1) * T.float32(_LOG2E)
                most[g] = T.max(one[0], T.float32(_NONE))
                whole[g] = T.exp2(one[0] - most[g])
        for step in range(steps):
            T.tvm_storage_sync("shared")
            at: T.let[T.int32] = step * _THREADS + tx
            if listed == 1:
                place[0] = _position(z, q, row, T.min(at, z.it.keys - 1)) - start
                places[tx] = T.if_then_else(at < z.it.keys and place[0] >= 0 and place[0] < length, place[0], -1)
            else:
                places[tx] = T.if_then_else(first + at < seen, first + at, -1)
            place[0] = places[tx]
            for g in T.unroll(z.group):
                part[g] = T.float32(0)
            if place[0] >= 0:
                for d in range(z.used):
                    one[0] = z.number(source, first_head, place[0], d, False)
                    for g in T.unroll(z.group):
                        part[g] = part[g] + query[g * z.used + d] * one[0]
            for g in T.unroll(z.group):
                weights[g * _THREADS + tx] = T.if_then_else(place[0] >= 0, part[g], T.float32(2 * _NONE))
            T.tvm_storage_sync("shared")
            for g in T.unroll(z.group):
                one[0] = most[g]
                for i in range(_THREADS):
                    one[0] = T.max(one[0], weights[g * _THREADS + i])
                one[1] = T.exp2(most[g] - one[0])
                most[g] = one[0]
                whole[g] = whole[g] * one[1]
                for c in T.unroll(z.columns):
                    sums[g * z.columns + c] = sums[g * z.columns + c] * one[1]
                part[g] = T.exp2(weights[g * _THREADS + tx] - one[0])
            T.tvm_storage_sync("shared")
            for g in T.unroll(z.group):
                weights[g * _THREADS + tx] = part[g]
            T.tvm_storage_sync("shared")
            for i in range(_THREADS):
                place[0] = places[i]
                if place[0] >= 0:
                    for g in T.unroll(z.group):
                        whole[g] = whole[g] + weights[g * _THREADS + i]
                    for c in T.unroll(z.columns):
                        if c * _THREADS + tx < z.summed:
                            one[0] = z.number(source, first_head, place[0], c * _THREADS + tx, True)
                            for g in T.unroll(z.group):
                                sums[g * z.columns + c] = sums[g * z.columns + c] + weights[g * _THREADS + i] * one[0]
        if tx == 0 and first_head == 0:
            out[row, z.behind(z.mark), z.mark % z.dim] = T.cast(T.float32(0), z.dtype)
        for g in T.unroll(z.group):
            one[0] = T.if_then_else(whole[g] > T.float32(0), T.float32(1) / whole[g], T.float32(0))
            one[1] = T.if_then_else(whole[g] > T.float32(0), most[g] + T.log2(whole[g]), T.float32(_NONE))
            for c in T.unroll(z.columns):
                if c * _THREADS + tx < z.summed:
                    at = T.meta_var(c * _THREADS + tx)
                    head = T.meta_var(2 * (first_head + g) + at // z.dim if z.joined else first_head + g)
                    out[row, head, at % z.dim] = T.cast(sums[g * z.columns + c] * one[0], z.dtype)
            if tx == 0:
                for half in T.unroll(1 + z.joined):
                    lse[row, (first_head + g) * (1 + z.joined) + half] = one[1]


@dataclass(frozen=True)
class Keys:
    """The sets of keys of a call: where one begins in what `source` reads, its first position and its length, of a
    sequence; that of `row`."""

    first: Callable[[Any], Any]
    start: Callable[[Any, Any], Any]
    length: Callable[[Any], Any]
    source: Callable[[Any], Source]


def _new(k: Any, v: Any, q_indptr: Any, kv_indptr: Any, positions: Any) -> Keys:
    def length(b: Any) -> Any:
        return kv_indptr[b + 1] - kv_indptr[b]

    def start(b: Any, row: Any) -> Any:
        return positions[row] - (length(b) - (q_indptr[b + 1] - row))

    return Keys(lambda b: kv_indptr[b], start, length, lambda first: _rows_of((k, v), first))


def _cached(pages: Any, indptr: Any, numbers: Any, last: Any, offsets: Any) -> Keys:
    def length(b: Any) -> Any:
        held = indptr[b + 1] - indptr[b]
        return tirx.if_then_else(held > 0, (held - 1) * _PAGE + last[b], 0)

    return Keys(lambda b: indptr[b], lambda b, row: offsets[b], length, lambda first: _pages_of(pages, numbers, first))


@T.macro
def _find(span, keys, indptr, batch, row):
    """A row's sequence, and of its keys the first, its position and how many they are. Without `indptr`, its own."""
    if indptr is None:
        span[0] = row
    else:
        span[0] = 0
        for i in range(batch):
            if indptr[i + 1] <= row:
                span[0] = i + 1
    span[1] = keys.first(span[0])
    span[2] = keys.start(span[0], row)
    span[3] = keys.length(span[0])


@T.macro
def _launch(z, n, batch, longest, indptr, keys, q, out, lse, positions, scale):
    """Both kernels; no set has more than `longest` keys."""
    stride = T.meta_var((longest + (_THREADS - 1)) // _THREADS * _THREADS)
    scores = T.sblock_alloc_buffer((T.min(n, _AT_ONCE) * stride + 4,), "int32")
    T.evaluate(scores.data)  # named on the host, which is to allocate it
    if T.tvm_thread_invariant(scale == T.float32(0)):
        for bx in T.thread_binding(T.min(n, _AT_ONCE), thread="blockIdx.x"):
            for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                with T.sblock("rows_that_choose"):
                    T.reads()
                    T.writes()
                    span = T.sblock_alloc_buffer((4,), "int32", scope="local")
                    for turn in range((n + _AT_ONCE - 1) // _AT_ONCE):
                        row: T.let[T.int32] = turn * _AT_ONCE + bx
                        if row < n:
                            _find(span, keys, indptr, batch, row)
                            source = T.meta_var(keys.source(span[1]))
                            _choose(z, source, q, out, scores, bx * stride, row, tx, positions[row], span[2], span[3])
    if T.tvm_thread_invariant(scale != T.float32(0)):
        for bx in T.thread_binding(n, thread="blockIdx.x"):
            for by in T.thread_binding(z.heads // z.group, thread="blockIdx.y"):
                for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with T.sblock("rows_that_attend"):
                        T.reads()
                        T.writes()
                        span = T.sblock_alloc_buffer((4,), "int32", scope="local")
                        _find(span, keys, indptr, batch, bx)
                        source = T.meta_var(keys.source(span[1]))
                        _attend(z, source, q, out, lse, bx, by * z.group, tx, positions[bx], span[2], span[3], scale)


def ragged(s: Structure, dtype: str) -> Any:
    """New tokens among themselves, with the arguments of TVM's kernel."""
    z = sizes_of(s, dtype)

    @T.prim_func(s_tir=True, private=True)
    def attention_prefill_ragged(
        q_: T.handle, q_indptr_: T.handle, k_: T.handle, v_: T.handle, kv_indptr_: T.handle, positions_: T.handle,
        offsets_: T.handle, out_: T.handle, lse_: T.handle, causal: T.int32, rotary_mode: T.int32,
        rope_scale: T.float32, rope_theta: T.float32, sm_scale: T.float32,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True})
        n = T.int32()
        kv = T.int32()
        batch = T.int32()
        q_indptr_at = T.int32()
        kv_indptr_at = T.int32()
        positions_at = T.int32()
        offsets_at = T.int32()
        q = T.match_buffer(q_, (n, z.total, z.dim), dtype)
        q_indptr = T.match_buffer(q_indptr_, (batch + 1,), "int32", elem_offset=q_indptr_at)
        k = T.match_buffer(k_, (kv, z.stored, z.dim), dtype)
        v = T.match_buffer(v_, (kv, z.stored, z.dim), dtype)
        kv_indptr = T.match_buffer(kv_indptr_, (batch + 1,), "int32", elem_offset=kv_indptr_at)
        positions = T.match_buffer(positions_, (n,), "int32", elem_offset=positions_at)
        T.match_buffer(offsets_, (batch,), "int32", elem_offset=offsets_at)
        out = T.match_buffer(out_, (n, z.total, z.dim), dtype)
        lse = T.match_buffer(lse_, (n, z.total), "float32")
        keys = T.meta_var(_new(k, v, q_indptr, kv_indptr, positions))
        _launch(z, n, batch, kv, q_indptr, keys, q, out, lse, positions, sm_scale)

    return attention_prefill_ragged


def prefill(s: Structure, dtype: str) -> Any:
    """New tokens over cached pages."""
    z = sizes_of(s, dtype)

    @T.prim_func(s_tir=True, private=True)
    def attention_prefill(
        q_: T.handle, q_indptr_: T.handle, pages_: T.handle, indptr_: T.handle, numbers_: T.handle, last_: T.handle,
        offsets_: T.handle, positions_: T.handle, out_: T.handle, lse_: T.handle, causal: T.int32,
        rotary_mode: T.int32, rope_scale: T.float32, rope_theta: T.float32, sm_scale: T.float32,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True})
        n = T.int32()
        batch = T.int32()
        held = T.int32()
        most = T.int32()
        pages_at = T.int64()
        q_indptr_at = T.int32()
        indptr_at = T.int32()
        numbers_at = T.int32()
        last_at = T.int32()
        offsets_at = T.int32()
        positions_at = T.int32()
        q = T.match_buffer(q_, (n, z.total, z.dim), dtype)
        q_indptr = T.match_buffer(q_indptr_, (batch + 1,), "int32", elem_offset=q_indptr_at)
        pages = T.match_buffer(pages_, (most, 2, z.stored, _PAGE, z.dim), dtype, elem_offset=pages_at)
        indptr = T.match_buffer(indptr_, (batch + 1,), "int32", elem_offset=indptr_at)
        numbers = T.match_buffer(numbers_, (held,), "int32", elem_offset=numbers_at)
        last = T.match_buffer(last_, (batch,), "int32", elem_offset=last_at)
        offsets = T.match_buffer(offsets_, (batch,), "int32", elem_offset=offsets_at)
        positions = T.match_buffer(positions_, (n,), "int32", elem_offset=positions_at)
        out = T.match_buffer(out_, (n, z.total, z.dim), dtype)
        lse = T.match_buffer(lse_, (n, z.total), "float32")
        keys = T.meta_var(_cached(pages, indptr, numbers, last, offsets))
        _launch(z, n, batch, held * _PAGE, q_indptr, keys, q, out, lse, positions, sm_scale)

    return attention_prefill


def decode(s: Structure, dtype: str) -> Any:
    """One new token of each sequence over cached pages."""
    z = sizes_of(s, dtype)

    @T.prim_func(s_tir=True, private=True)
    def attention_decode(
        q_: T.handle, pages_: T.handle, indptr_: T.handle, numbers_: T.handle, last_: T.handle, offsets_: T.handle,
        positions_: T.handle, out_: T.handle, lse_: T.handle, rotary_mode: T.int32, rope_scale: T.float32,
        rope_theta: T.float32, sm_scale: T.float32,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True})
        n = T.int32()
        held = T.int32()
        most = T.int32()
        pages_at = T.int64()
        indptr_at = T.int32()
        numbers_at = T.int32()
        last_at = T.int32()
        offsets_at = T.int32()
        positions_at = T.int32()
        q = T.match_buffer(q_, (n, z.total, z.dim), dtype)
        pages = T.match_buffer(pages_, (most, 2, z.stored, _PAGE, z.dim), dtype, elem_offset=pages_at)
        indptr = T.match_buffer(indptr_, (n + 1,), "int32", elem_offset=indptr_at)
        numbers = T.match_buffer(numbers_, (held,), "int32", elem_offset=numbers_at)
        last = T.match_buffer(last_, (n,), "int32", elem_offset=last_at)
        offsets = T.match_buffer(offsets_, (n,), "int32", elem_offset=offsets_at)
        positions = T.match_buffer(positions_, (n,), "int32", elem_offset=positions_at)
        out = T.match_buffer(out_, (n, z.total, z.dim), dtype)
        lse = T.match_buffer(lse_, (n, z.total), "float32")
        keys = T.meta_var(_cached(pages, indptr, numbers, last, offsets))
        _launch(z, n, n, held * _PAGE, None, keys, q, out, lse, positions, sm_scale)

    return attention_decode


@T.macro
def _read(z, of, row, tx, first, score, place, ends):
    """A thread's part of a list, from `first` on; what is behind the list's end is nothing."""
    ends[tx] = z.it.keys
    for i in range(z.rounds):
        if i * _THREADS + tx < z.it.keys and _position(z, of, row, i * _THREADS + tx) < 0:
            ends[tx] = T.min(ends[tx], i * _THREADS + tx)
    T.tvm_storage_sync("shared")
    for i in range(z.rounds):
        place[first + i] = 0
        score[first + i] = z.it.keys
        for j in range(_THREADS):
            score[first + i] = T.min(score[first + i], ends[j])
        if i * _THREADS + tx < score[first + i]:
            place[first + i] = _position(z, of, row, i * _THREADS + tx)
            score[first + i] = _score(z, of, row, i * _THREADS + tx)
        else:
            score[first + i] = _LEAST
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
            for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                with T.sblock("merge"):
                    T.reads()
                    T.writes()
                    counts = T.sblock_alloc_buffer((_THREADS,), "int32", scope="shared")
                    ends = T.sblock_alloc_buffer((_THREADS,), "int32", scope="shared")
                    score = T.sblock_alloc_buffer((each,), "int32", scope="local")
                    place = T.sblock_alloc_buffer((each,), "int32", scope="local")
                    mine = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    total = T.sblock_alloc_buffer((2,), "int32", scope="local")
                    least = T.sblock_alloc_buffer((4,), "int32", scope="local")
                    share = T.sblock_alloc_buffer((3,), "float32", scope="local")
                    if T.cast(v[bx, z.behind(z.mark), z.mark % z.dim], "float32") == T.float32(1):
                        _read(z, v, bx, tx, 0, score, place, ends)
                        _read(z, v_other, bx, tx, z.rounds, score, place, ends)
                        scores = T.meta_var(_of(score))
                        places = T.meta_var(_of(place))
                        _select(z.it.keys, each, scores, places, counts, tx, mine, total, least)
                        _write(z, v, bx, each, scores, places, counts, tx, mine, total, least)
                    else:
                        for i in range((numbers + _THREADS - 1) // _THREADS):
                            at: T.let[T.int32] = i * _THREADS + tx
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
                        for i in range((logs + _THREADS - 1) // _THREADS):
                            at: T.let[T.int32] = i * _THREADS + tx
                            if at < logs:
                                share[2] = T.max(s[bx, at], s_other[bx, at])
                                share[0] = T.exp2(s[bx, at] - share[2]) + T.exp2(s_other[bx, at] - share[2])
                                s[bx, at] = T.log2(share[0]) + share[2]

    return attention_merge
