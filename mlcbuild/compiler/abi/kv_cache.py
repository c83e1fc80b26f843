"""`create_tir_paged_kv_cache`: TVM's paged KV cache, with a device's kernels in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import ir, relax, tirx
from tvm.relax.frontend.nn.llm import kv_cache as tvm_kv_cache

from mlcbuild.models import rope
from mlcbuild.models.structure import Structure

_MHA, _ROPE_NORMAL = 0, 1


@dataclass(frozen=True)
class Kernels:
    """What differs between devices: PrimFuncs, with the arguments that the runtime gives them."""

    ragged: Any
    prefill: Any
    decode: Any
    merge: Any
    split_rotary: Any
    append: Any
    copy_single_page: Any
    compact: Any


def emit_create(
    builder: relax.BlockBuilder,
    structure: Structure,
    dtype: str,
    kernels: Callable[[Structure, str, tirx.Var, rope.Rotary], Kernels],
) -> None:
    """Add `create_tir_paged_kv_cache(max_batch, max_total_seq, prefill_chunk, page_size, support_sliding)`.

    Each argument is a shape of one element. The runtime calls it with a page size of 16, and without `support_sliding`:
    the cache keeps all tokens, and layers with a window look back no further. (A cache that forgets what a window has
    passed lets a chunk's first tokens see too much, and counts positions anew.) `kernels` makes them for a structure,
    the model dtype, a page size, and what is turned in the cache. The order of what the cache is made from is that of
    `vm.builtin.paged_attention_kv_cache_create`.
    """
    s = structure
    heads, kv_heads, dim = s.cache_heads
    names = ("max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size", "support_sliding_window")
    sizes = [tirx.Var(name, "int64") for name in names]
    params = [relax.Var(f"{name}_", relax.ShapeType([size])) for name, size in zip(names, sizes, strict=True)]
    layers = len(s.cached)
    rotary = rope.rotary(s) if rope.in_cache(s) else rope.NOTHING
    table = rope.inverse_frequencies(s) if rotary.dim else np.zeros(1, np.float32)

    def kernel(function: Any, name: str) -> Any:
        return builder.add_func(function.without_attr("global_symbol"), name)

    def backend(function: Any, name: str) -> Any:
        return relax.Tuple([ir.StringImm("tirx"), kernel(function, name)])

    none = relax.Tuple([])
    with builder.function("create_tir_paged_kv_cache", params):
        own = kernels(s, dtype, sizes[3], rotary)
        cache = relax.call_pure_packed(
            "vm.builtin.paged_attention_kv_cache_create",
            relax.ShapeExpr(sizes),
            relax.ShapeExpr([0, layers]),
            relax.prim_value(heads),
            relax.prim_value(kv_heads),
            relax.prim_value(dim),
            relax.prim_value(dim),
            relax.ShapeExpr([_MHA] * layers),
            relax.prim_value(False),  # no KV transfer between machines
            relax.prim_value(_ROPE_NORMAL),
            relax.prim_value(1),  # rope scale and theta: only kernels that turn keys themselves read them
            relax.prim_value(int(s.rope_theta)),
            relax.const(table),
            relax.op.zeros((), dtype),
            kernel(own.append, "kv_cache_transpose_append"),
            relax.prim_value(0),  # no latent attention
            backend(own.ragged, "attention_prefill_ragged"),
            backend(own.prefill, "attention_prefill"),
            backend(own.decode, "attention_decode"),
            none,  # a cache that forgets what is before a window,
            none,  # and decoding with it
            none,  # attention over token trees, in the cache and
            none,  # among new tokens: for speculative decoding with trees, which this library does not offer
            none,  # latent attention
            relax.Tuple([kernel(own.merge, "attention_merge")]),
            kernel(own.split_rotary, "split_rotary"),
            kernel(own.copy_single_page, "kv_cache_copy_single_page"),
            kernel(tvm_kv_cache._kv_cache_debug_get_kv(layers, kv_heads, dim, dtype), "kv_cache_debug_get_kv"),
            kernel(own.compact, "kv_cache_compact_kv_copy"),
            ty_args=relax.AnyType(),
        )
        builder.emit_func_output(builder.emit(cache))
