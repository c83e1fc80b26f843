"""Attention of one layer, from normed hidden states to what is added to the residual."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import relax

from mlcbuild.models.operations import Expr
from mlcbuild.models.weights import Given

if TYPE_CHECKING:
    from mlcbuild.models.decoder import Decoder


def attention(d: Decoder, x: Expr, cache: Expr, layer_id: Expr, weight: Given, n: Expr, number: int) -> Expr:
    """x [n, H] -> [n, H], through the KV cache's layer `layer_id`; `number` is a layer of the same kind as this one.

    The KV cache appends the keys and values, turns queries and keys by their positions, and attends.
    """
    s = d.structure
    heads, kv_heads, dim = s.num_attention_heads, s.num_key_value_heads, s.head_dim
    qkv = d.project(x, weight, "qkv", d.dtype)
    qkv = d.builder.emit(relax.op.reshape(qkv, [n, heads + 2 * kv_heads, dim]))
    out = d.builder.emit(
        relax.call_dps_packed(
            "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
            [cache, layer_id, relax.prim_value(dim**-0.5), qkv],
            out_ty=relax.TensorType([n, heads, dim], d.dtype),
        )
    )
    out = d.builder.emit(relax.op.reshape(out, [n, heads * dim]))
    return d.project(out, weight, "o")
