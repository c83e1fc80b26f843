"""Attention of one layer, from normed hidden states to what is added to the residual."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import relax

from mlcbuild.models.operations import Expr
from mlcbuild.models.rope import in_cache, inverse_frequencies, rotary
from mlcbuild.models.weights import Given

if TYPE_CHECKING:
    from mlcbuild.models.decoder import Decoder


def query_positions(d: Decoder, cache: Expr, n: Expr) -> Expr:
    """Each token's position in its sequence, which the KV cache knows: int32 [n]."""
    name = "vm.builtin.attention_kv_cache_get_query_positions"
    return d.builder.emit(relax.call_pure_packed(name, cache, ty_args=relax.TensorType([n], "int32")))


def attention(d: Decoder, x: Expr, cache: Expr, layer_id: Expr, weight: Given, n: Expr, number: int) -> Expr:
    """x [n, H] -> [n, H], through the KV cache's layer `layer_id`; `number` is a layer of the same kind as this one.

    The KV cache appends the keys and values, turns queries and keys by their positions where that is the same for all
    layers, and attends. A layer that sees a window of positions only gives the cache a negative scale: the cache tells
    its kernels nothing else about layers. The window and the soft cap are known to the kernels.
    """
    s = d.structure
    heads, kv_heads, dim = s.num_attention_heads, s.num_key_value_heads, s.head_dim
    if "qkv_proj" in weight:
        qkv = d.project(x, weight, "qkv", d.dtype)
    else:
        parts = [d.project(x, weight, name, d.dtype) for name in ("q", "k", "v")]
        qkv = d.builder.emit(relax.op.concat(parts, axis=1))
    if s.clip_qkv is not None:
        qkv = d.builder.emit(relax.op.clip(qkv, -s.clip_qkv, s.clip_qkv))
    qkv = d.builder.emit(relax.op.reshape(qkv, [n, heads + 2 * kv_heads, dim]))
    if s.qk_norm != "none":
        roles = ("q_norm", "k_norm", "q_norm_bias", "k_norm_bias")
        weights = tuple(weight(role).plain if role in weight else None for role in roles)
        qkv = d.operations.norm_heads(qkv, weights, (heads, kv_heads), s.qk_norm, s.norm, s.norm_eps)
    kind = s.layer_type(number)
    if s.rope != "none" and not in_cache(s):
        positions, table = query_positions(d, cache, n), inverse_frequencies(s, kind)
        qkv = d.operations.rope(qkv, positions, table, (heads, kv_heads), rotary(s, kind))
    scale = dim**-0.5 if s.attention_scale is None else s.attention_scale
    slides = kind == "sliding" and s.sliding_window_size is not None
    out = d.builder.emit(
        relax.call_dps_packed(
            "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
            [cache, layer_id, relax.prim_value(-scale if slides else scale), qkv],
            out_ty=relax.TensorType([n, heads, dim], d.dtype),
        )
    )
    out = d.builder.emit(relax.op.reshape(out, [n, heads * dim]))
    return d.project(out, weight, "o")
