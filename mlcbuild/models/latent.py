"""Latent attention: queries, keys and values as products of narrow vectors (DeepSeek-V2, arXiv 2405.04434, 2.1).

    query of a head:  q_proj x, or q_b_proj norm(q_a_proj x):        qk_head_dim numbers, the last rotary_dim turned
    (latent, turned part of every head's key) = kv_a_proj x:         kv_lora_rank and rotary_dim numbers
    (rest of a head's key, its value) = kv_b_proj norm(latent):      qk_head_dim - rotary_dim and value_head_dim numbers

The KV cache is given whole keys and values. So every head has its own, and all have the same width, head_dim: shorter
ones end with zeros. What is turned comes first in queries and keys, where the cache's rotary kernel turns it. Scores
are the same in any order.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import relax, te, tirx

from mlcbuild.models.decoder import Decoder
from mlcbuild.models.operations import Expr
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Given

_EPS = 1e-6  # of the latents' norms, whatever config.json's rms_norm_eps is (transformers modeling_deepseek_v2.py)


def heads_of(d: Decoder, x: Expr, weight: Given) -> Expr:
    """x [n, H] -> queries, keys and values [n, 3 * heads, head_dim] in the model dtype."""
    s = d.structure
    if "q_a_proj" in weight:
        narrow = d.operations.rms_norm(d.project(x, weight, "q_a"), weight("q_a_norm").plain, _EPS)
        narrow = d.scaled(narrow, s.latent_scales[0])
        q = d.project(narrow, weight, "q_b", d.dtype)
    else:
        q = d.project(x, weight, "q", d.dtype)
    parts = d.builder.emit(relax.op.split(d.project(x, weight, "kv_a"), [s.kv_lora_rank], axis=1))
    latent, turned = (d.builder.emit(relax.TupleGetItem(parts, i)) for i in range(2))
    latent = d.scaled(d.operations.rms_norm(latent, weight("kv_a_norm").plain, _EPS), s.latent_scales[1])
    kv = d.project(latent, weight, "kv_b", d.dtype)
    turned = d.cast(turned, d.dtype)
    return d.builder.emit_te(partial(_whole, s), q, turned, kv, primfunc_name_hint="latent_heads")


def _whole(s: Structure, q: te.Tensor, turned: te.Tensor, kv: te.Tensor) -> te.Tensor:
    heads, width, rope, values = s.num_attention_heads, s.qk_head_dim, s.rotary_dim or 0, s.value_head_dim
    rest = width - rope
    zero = tirx.const(0, q.dtype)

    def number(i: Any, h: Any, d: Any) -> Any:
        query, pair = (h % heads) * width, (h % heads) * (rest + values)
        of_query = tirx.if_then_else(d < rope, q[i, query + rest + d], q[i, query + d - rope])
        of_key = tirx.if_then_else(d < rope, turned[i, d], kv[i, pair + d - rope])
        of_both = tirx.if_then_else(h < heads, of_query, of_key)
        of_value = tirx.if_then_else(d < values, kv[i, pair + rest + d], zero)
        return tirx.if_then_else(h < 2 * heads, tirx.if_then_else(d < width, of_both, zero), of_value)

    return te.compute((q.shape[0], 3 * heads, s.head_dim), number, name="latent_heads")
