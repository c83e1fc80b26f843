"""Attention on the CPU: the TIR functions that the paged KV cache calls, around the kernels of kernels/attention.c.

Argument lists are those of the KV cache in apache-tvm (src/runtime/vm/attn_backend.h). Rotary embedding is applied
before the cache (RopeMode.NORMAL), so the rope arguments are not used here; neither is `causal`: a row sees what is not
after its own position. The cache tells kernels nothing about layers, so layers with a sliding window say so by the sign
of their scale (mlcbuild.models.layer), and the window is measured in the positions that the cache gives to kernels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.relax.frontend.nn.llm import kv_cache as tvm_kv_cache
from tvm.script import tirx as T

from mlcbuild.compiler.abi.kv_cache import Kernels
from mlcbuild.compiler.cpu import calls, rows
from mlcbuild.models.indexer import indexer_of
from mlcbuild.models.rope import Rotary
from mlcbuild.models.structure import Structure

PAGE_SIZE = 16
QUERIES = 48  # query rows times the heads that share a key, in one task; likewise in attention.c
_MERGE = "mlcbuild_attention_merge"
_SHARING = 16  # heads that share a key, at most, in one task where all do
_SERIAL_MERGES = 64  # of one head each
_ROPE = {"rotary_mode": "int32", "rope_scale": "float32", "rope_theta": "float32", "sm_scale": "float32"}


@dataclass(frozen=True)
class Shape:
    """What the attention of all layers has in common: `window` positions are seen by layers that slide, 0 where none
    does, below 0 where it is of chunks; `cap` is the soft cap of scores, `alibi` the largest exponent of linear
    biases, 0 where there is none. With `sinks`, the last number of a query is its sink. `dtype` is that of queries,
    keys and values. `joined`: how many numbers of a row are its value, where heads are halves of rows of latents
    (mlcbuild.models.absorbed), else 0. `index`: of an indexer (mlcbuild.models.indexer), numbers that the kernels of
    kernels/choice.c take; the cache has `more` heads of queries and `stored` ones of keys then."""

    heads: int
    kv_heads: int
    dim: int
    dtype: str
    window: int = 0
    cap: float = 0.0
    alibi: float = 0.0
    sinks: bool = False
    joined: int = 0
    index: tuple[int, ...] = ()
    more: int = 0
    stored: int = 0

    def array(self, rows: str, heads: int) -> tuple[calls.Shape, str]:
        return (rows, heads, self.dim), self.dtype

    @property
    def outputs(self) -> list[tuple[calls.Shape, str]]:
        """The rows and log2 of their sums of 2^score."""
        return [self.queries, (("n", self.heads + self.more), "float32")]

    @property
    def queries(self) -> tuple[calls.Shape, str]:
        return self.array("n", self.heads + self.more)

    def kernel(self, name: str) -> str:
        return f"mlcbuild_{'choice' if self.index else 'attention'}_{name}"

    @property
    def tasks(self) -> int:
        """To a block of rows: one for each head of keys, or for some heads of queries where all share a key."""
        if not self.joined:
            return self.kv_heads
        heads = self.heads // 2
        return next(n for n in range(-(-heads // _SHARING), heads + 1) if heads % n == 0)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.heads // 2 if self.joined else self.heads, self.tasks, self.dim, self.joined, *self.index

    @property
    def rows_of_a_task(self) -> int:
        heads, tasks, *_ = self.sizes
        return max(1, QUERIES * tasks // heads)

    def limits(self, symbols: dict[str, Any]) -> tuple[Any, ...]:
        sizes = (tirx.const(size, "float32") for size in (self.cap, self.alibi))
        return self.window, calls.Flag(self.sinks), *sizes, symbols["sm_scale"]


def cache_kernels(structure: Structure, dtype: str, page_size: tirx.Var, rotary: Rotary) -> Kernels:
    """What the KV cache of a CPU library calls; attention is made for the runtime's page size of 16."""
    heads, kv_heads, dim = structure.cache_heads
    shape = shape_of(structure, dtype)
    return Kernels(
        ragged=ragged(shape),
        prefill=prefill(shape),
        decode=decode(shape),
        merge=merge_choices(shape) if shape.index else merge(dtype),
        split_rotary=rows.split_rotary(rows.Heads(heads, kv_heads, dim, dtype), rotary),
        append=tvm_kv_cache._kv_cache_transpose_append(kv_heads, dim, dtype),
        copy_single_page=tvm_kv_cache._copy_single_page_cpu(kv_heads, page_size, dim, dtype),
        compact=tvm_kv_cache._compact_kv_copy_cpu(kv_heads, dim, dtype),
    )


def shape_of(s: Structure, dtype: str) -> Shape:
    """What the kernels of a structure are made for."""
    heads, kv_heads, dim = s.cache_heads
    window = (s.sliding_window_size or 0) * (-1 if s.chunked else 1)
    limits = window, s.attn_logit_softcapping or 0.0, s.alibi_bias_max or 0.0, "sinks" in s.roles()
    joined, it = s.kv_lora_rank if s.absorbed else 0, indexer_of(s) if s.indexer else None
    shape = Shape(heads, kv_heads, dim, dtype, *limits, joined=joined, stored=kv_heads)
    if it is not None:
        more, own = heads - it.queries, (it.queries, it.key_heads)
        used = joined + (s.rotary_dim or 0) if joined else dim
        index = it.keys, it.heads, it.width, it.queries * dim, more * dim, it.at, it.key_head, used, kv_heads
        shape = replace(shape, heads=own[0], kv_heads=own[1], more=more, index=index)
    return shape


@functools.cache
def ragged(shape: Shape) -> Any:
    """Attention of new tokens among themselves."""
    block = shape.rows_of_a_task
    indptr = (("b + 1",), "int32")
    keys = shape.array("kv", shape.stored)
    inputs = [shape.queries, indptr, keys, keys, indptr, (("n",), "int32"), (("b",), "int32")]

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        n, limits = symbols["n"], shape.limits(symbols)
        calls.for_each(
            (n + block - 1) // block * shape.tasks,
            lambda task: calls.call(
                shape.kernel("ragged"), *inputs[:6], *outputs, n, *shape.sizes, block, task, *limits
            ),
        )

    return calls.function("attention_prefill_ragged", inputs, shape.outputs, body, {"causal": "int32", **_ROPE})


@functools.cache
def prefill(shape: Shape) -> Any:
    """Attention of new tokens over cached pages."""
    q, *rest = _paged(shape, "b")
    inputs = [q, (("b + 1",), "int32"), *rest]

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        _over_pages(shape, shape.rows_of_a_task, symbols, inputs, outputs)

    return calls.function("attention_prefill", inputs, shape.outputs, body, {"causal": "int32", **_ROPE})


@functools.cache
def decode(shape: Shape) -> Any:
    """Attention of one new token per sequence over cached pages."""

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        q, *rest = inputs
        _over_pages(shape, 1, symbols, [q, None, *rest], outputs)

    return calls.function("attention_decode", _paged(shape, "n"), shape.outputs, body, _ROPE)


def _paged(shape: Shape, sequences: str) -> list[tuple[calls.Shape, str]]:
    """q, pages, page_indptr, page_values, last_page_len, k_rope_pos_offset, q_rope_position."""
    pages = (("pages", 2, shape.stored, PAGE_SIZE, shape.dim), shape.dtype)
    vectors = [((size,), "int32") for size in (f"{sequences} + 1", "held", sequences, sequences, "n")]
    return [shape.queries, pages, *vectors]


def _over_pages(shape: Shape, block: int, symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
    n, limits = symbols["n"], shape.limits(symbols)
    sizes = (*shape.sizes, PAGE_SIZE, block)
    calls.for_each(
        (n + block - 1) // block * shape.tasks,
        lambda task: calls.call(shape.kernel("paged"), *inputs, *outputs, n, *sizes, task, *limits),
    )


@functools.cache
def merge_choices(shape: Shape) -> Any:
    """As `merge`, or two lists of chosen keys into one."""
    rows = shape.outputs
    rest = shape.heads + shape.more, shape.dim, shape.index[0], shape.heads * shape.dim, shape.heads

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        calls.for_each(symbols["n"], lambda row: calls.call(shape.kernel("merge"), *outputs, *rest, row))

    return calls.function("attention_merge", [], [*rows, *rows], body)


@functools.cache
def merge(dtype: str) -> Any:
    """Two attentions over different keys into one, in place: v [n, heads, dim], s [n, heads]."""

    @T.prim_func(s_tir=True, private=True)
    def attention_merge(var_v: T.handle, var_s: T.handle, var_v_other: T.handle, var_s_other: T.handle):
        T.func_attr({"tirx.is_scheduled": True})
        n = T.int64()
        heads = T.int64()
        dim = T.int64()
        v = T.match_buffer(var_v, (n, heads, dim), dtype)
        s = T.match_buffer(var_s, (n, heads), "float32")
        v_other = T.match_buffer(var_v_other, (n, heads, dim), dtype)
        s_other = T.match_buffer(var_s_other, (n, heads), "float32")
        with T.sblock("merge"):
            T.reads(v[0:n, 0:heads, 0:dim], s[0:n, 0:heads], v_other[0:n, 0:heads, 0:dim], s_other[0:n, 0:heads])
            T.writes(v[0:n, 0:heads, 0:dim], s[0:n, 0:heads])
            if n * heads <= _SERIAL_MERGES:
                for task in T.serial(n * heads):
                    T.evaluate(T.call_extern("void", _MERGE, v.data, s.data, v_other.data, s_other.data, dim, task))
            else:
                for task in T.parallel(n * heads):
                    T.evaluate(T.call_extern("void", _MERGE, v.data, s.data, v_other.data, s_other.data, dim, task))

    return attention_merge
