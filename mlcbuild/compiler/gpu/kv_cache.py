"""`create_tir_paged_kv_cache` of a GPU library: TVM's paged KV cache with its attention kernels in it."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import ir, relax, target, tirx
from tvm.relax.frontend.nn.llm import kv_cache as tvm_kv_cache

from mlcbuild.compiler.gpu import attention
from mlcbuild.compiler.gpu.rope import split_rotary
from mlcbuild.compiler.gpu.script import quick
from mlcbuild.errors import MlcBuildError
from mlcbuild.models import rope
from mlcbuild.models.structure import Structure

_MHA, _ROPE_NORMAL = 0, 1


def check(structure: Structure) -> None:
    """Raise MlcBuildError, naming it, for a choice that TVM's GPU kernels do not have."""
    s = structure
    if s.head_dim % 4 or not 32 <= s.head_dim <= 256:
        raise MlcBuildError(f"head_dim is {s.head_dim}: GPU attention takes multiples of 4 from 32 to 256")
    if s.num_attention_heads % s.num_key_value_heads:
        raise MlcBuildError(
            f"num_attention_heads is {s.num_attention_heads}, num_key_value_heads {s.num_key_value_heads}: "
            "GPU attention needs a whole number of query heads for each key head"
        )


def emit_create(builder: relax.BlockBuilder, structure: Structure, dtype: str) -> None:
    """Add `create_tir_paged_kv_cache(max_batch, max_total_seq, prefill_chunk, page_size, support_sliding)`.

    Each argument is a shape of one element. The order of what the cache is made from is that of
    `vm.builtin.paged_attention_kv_cache_create`.
    """
    s, device = structure, target.Target.current()
    heads, kv_heads, dim = s.num_attention_heads, s.num_key_value_heads, s.head_dim
    names = ("max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size", "support_sliding_window")
    sizes = [tirx.Var(name, "int64") for name in names]
    params = [relax.Var(f"{name}_", relax.ShapeType([size])) for name, size in zip(names, sizes, strict=True)]

    def kernel(function: Any, name: str) -> Any:
        return builder.add_func(function.without_attr("global_symbol"), name)

    def backend(function: Any, name: str) -> Any:
        return relax.Tuple([ir.StringImm("tirx"), kernel(function, name)])

    none = relax.Tuple([])
    rotary = rope.rotary(s) if rope.in_cache(s) else rope.NOTHING
    table = rope.inverse_frequencies(s) if rotary.dim else np.zeros(1, np.float32)
    with quick(), builder.function("create_tir_paged_kv_cache", params):
        ragged, prefill, decode = attention.kernels(s, dtype, device)
        cache = relax.call_pure_packed(
            "vm.builtin.paged_attention_kv_cache_create",
            relax.ShapeExpr(sizes),
            relax.ShapeExpr([0, s.num_hidden_layers]),
            relax.prim_value(heads),
            relax.prim_value(kv_heads),
            relax.prim_value(dim),
            relax.prim_value(dim),
            relax.ShapeExpr([_MHA] * s.num_hidden_layers),
            relax.prim_value(False),  # no KV transfer between machines
            relax.prim_value(_ROPE_NORMAL),
            relax.prim_value(1),  # rope scale and theta: only kernels that turn keys themselves read them
            relax.prim_value(int(s.rope_theta)),
            relax.const(table),
            relax.op.zeros((), dtype),
            kernel(tvm_kv_cache._kv_cache_transpose_append(kv_heads, dim, dtype), "kv_cache_transpose_append"),
            relax.prim_value(0),  # no latent attention
            backend(ragged, "attention_prefill_ragged"),
            backend(prefill, "attention_prefill"),
            backend(decode, "attention_decode"),
            none,  # a cache that forgets what is before a window,
            none,  # and decoding with it
            none,  # attention over token trees, in the cache and
            none,  # among new tokens: for speculative decoding with trees, which this library does not offer
            none,  # latent attention
            relax.Tuple([kernel(tvm_kv_cache._merge_state_inplace(heads, dim, dtype, device), "attention_merge")]),
            kernel(split_rotary(heads, kv_heads, dim, rotary, dtype), "split_rotary"),
            kernel(tvm_kv_cache._copy_single_page(kv_heads, sizes[3], dim, dtype, device), "kv_cache_copy_single_page"),
            kernel(
                tvm_kv_cache._kv_cache_debug_get_kv(s.num_hidden_layers, kv_heads, dim, dtype), "kv_cache_debug_get_kv"
            ),
            kernel(tvm_kv_cache._compact_kv_copy(kv_heads, dim, dtype, device), "kv_cache_compact_kv_copy"),
            ty_args=relax.AnyType(),
        )
        builder.emit_func_output(builder.emit(cache))
