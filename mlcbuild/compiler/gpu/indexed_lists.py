"""What kernels for an indexer's lists read and write, as expressions (mlcbuild.models.indexer has heads and lists).

A number behind a row's list is 1 where a call chooses, and behind that are the scores of what is listed: whole numbers
in their order, four digits to each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from mlcbuild.compiler.gpu.rows import float32
from mlcbuild.models.indexer import DIGITS, Indexer, indexer_of
from mlcbuild.models.structure import Structure

THREADS = 128  # of a block
LEAST = 1 - (1 << 31)  # of what is ordered: no score's
SCORE_DIGITS = 4
PAGE = 16
_GROUP = 4  # heads of a block that share a key

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
        return -(-self.summed // THREADS)

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
        return -(-self.it.keys // THREADS)

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


def digit_of(number: Any, digit: Any) -> Any:
    return (number >> (8 * digit)) & 255


def _whole(value: Any) -> Any:
    return value.astype("float32").astype("int32")


def position_of(z: Sizes, of: Any, row: Any, at: Any) -> Any:
    """The `at`-th position of a row's list; -1 at its end."""
    found = tirx.const(-1, "int32")
    for digit in range(DIGITS):
        place = DIGITS * at + digit
        found = found + (_whole(of[row, z.behind(place), place % z.dim]) << (8 * digit))
    return found


def score_of(z: Sizes, of: Any, row: Any, at: Any) -> Any:
    found = tirx.const(0, "int32")
    for digit in range(SCORE_DIGITS):
        place = z.mark + 1 + SCORE_DIGITS * at + digit
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
    return lambda side, head, place, at: pages[numbers[first + place // PAGE], side, head, place % PAGE, at]


def own_scores(scores: Any, base: Any, tx: Any) -> Callable[[Any], Any]:
    return lambda i: scores[base + i * THREADS + tx]


def own_places(start: Any, tx: Any) -> Callable[[Any], Any]:
    return lambda i: start + i * THREADS + tx


def within(buffer: Any) -> Callable[[Any], Any]:
    return lambda i: buffer[i]


def is_chosen(score: Any, position: Any, least: Any) -> Any:
    equal = tirx.all(score == least[0], score != tirx.const(LEAST, "int32"), position <= least[1])
    return tirx.any(score > least[0], equal)


@dataclass(frozen=True)
class Keys:
    """The sets of keys of a call: where one begins in what `source` reads, its first position and its length, of a
    sequence; that of `row`."""

    first: Callable[[Any], Any]
    start: Callable[[Any, Any], Any]
    length: Callable[[Any], Any]
    source: Callable[[Any], Source]


def new_keys(k: Any, v: Any, q_indptr: Any, kv_indptr: Any, positions: Any) -> Keys:
    def length(b: Any) -> Any:
        return kv_indptr[b + 1] - kv_indptr[b]

    def start(b: Any, row: Any) -> Any:
        return positions[row] - (length(b) - (q_indptr[b + 1] - row))

    return Keys(lambda b: kv_indptr[b], start, length, lambda first: _rows_of((k, v), first))


def cached_keys(pages: Any, indptr: Any, numbers: Any, last: Any, offsets: Any) -> Keys:
    def length(b: Any) -> Any:
        held = indptr[b + 1] - indptr[b]
        return tirx.if_then_else(held > 0, (held - 1) * PAGE + last[b], 0)

    return Keys(lambda b: indptr[b], lambda b, row: offsets[b], length, lambda first: _pages_of(pages, numbers, first))
