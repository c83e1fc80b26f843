"""Latent attention: queries, keys and values as products of narrow vectors (DeepSeek-V2, arXiv 2405.04434, 2.1).

    query of a head:  q_proj x, or q_b_proj norm(q_a_proj x):        qk_head_dim numbers, the last rotary_dim turned
    (latent, turned part of every head's key) = kv_a_proj x:         kv_lora_rank and rotary_dim numbers
    (rest of a head's key, its value) = kv_b_proj norm(latent):      qk_head_dim - rotary_dim and value_head_dim numbers

The turned part of keys may be normed, too (`k_turned_norm`), queries may be made of their latent as it is besides, and
each head's may have a gate behind it (A.X K2).

Where the KV cache has latents (mlcbuild.models.absorbed), kv_b_proj is there as two stacks of matrices, one for each
head: latent_keys_proj, transposed, and latent_values_proj. They are multiplied as those of experts are, of which a
token's query of head h chooses the h-th. What is turned is turned before it reaches the cache.

Else the KV cache is given whole keys and values. So every head has its own, and all have the same width, head_dim:
shorter ones end with zeros, or with a sink. Heads of a layer that has fewer stand apart, with the same keys and values
in between. What is turned comes first in queries and keys, where the cache's rotary kernel turns it. Scores are the
same in any order.

A structure's fields: kv_lora_rank, q_lora_rank: widths of latents, 0: there are none. whole_keys: the KV cache has
whole keys and values where it could have latents. long_latents: latents are multiplied with the root of hidden_size
over their width once they are normed. latent_eps: of their norms. raw_query_latent: queries are made of the normed
latent and, behind it, of the latent as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import relax, te, tirx

from mlcbuild.models.decoder import Decoder
from mlcbuild.models.heads import NO_SINK
from mlcbuild.models.operations import Expr
from mlcbuild.models.rope import inverse_frequencies, rotary
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Given


def heads_of(
    d: Decoder, x: Expr, own: Structure, weight: Given, positions: Callable[[], Expr], turns: bool
) -> tuple[Expr, Expr | None, Expr | None]:
    """x [n, H] -> queries, keys and values as the KV cache has its heads [n, heads + 2 * key heads, width], in the
    model dtype; where there are gates [n, the layer's heads * value_head_dim] in the compute dtype; and the normed
    latent of queries, where there is one.

    `positions`: the tokens' in their sequence, where a layer `turns`; of latents alone.
    """
    s, narrow = d.structure, None
    if "q_a_proj" in weight:
        raw = d.project(x, weight, "q_a")
        narrow = _normed(d, raw, weight, "q_a_norm")
        both = d.builder.emit(relax.op.concat([narrow, raw], axis=1)) if own.raw_query_latent else narrow
        q = d.project(both, weight, "q_b", d.dtype)
    else:
        q = d.project(x, weight, "q", d.dtype)
    parts = d.builder.emit(relax.op.split(d.project(x, weight, "kv_a"), [own.kv_lora_rank], axis=1))
    latent, turned = (d.builder.emit(relax.TupleGetItem(parts, i)) for i in range(2))
    latent = _normed(d, latent, weight, "kv_a_norm")
    if "k_turned_norm" in weight:
        turned = d.operations.rms_norm(turned, weight("k_turned_norm").plain, own.latent_eps)
    turned = d.cast(turned, d.dtype)
    if s.absorbed:
        return _latents(d, q, d.cast(latent, d.dtype), turned, weight, positions if turns else None), None, narrow
    kv = d.project(latent, weight, "kv_b", d.dtype)
    sinks = [d.cast(weight("sinks").plain, "float32")] if "sinks" in weight else []
    whole = partial(_whole, s, own)
    qkv = d.builder.emit_te(whole, q, turned, kv, *sinks, primfunc_name_hint="latent_heads")
    if not own.query_gate:
        return qkv, None, narrow
    gates = d.builder.emit_te(partial(_gates, own), q, primfunc_name_hint="latent_gates")
    return qkv, d.cast(gates, d.operations.compute), narrow


def _normed(d: Decoder, latent: Expr, weight: Given, role: str) -> Expr:
    normed = d.operations.rms_norm(latent, weight(role).plain, d.structure.latent_eps)
    long = (d.structure.hidden_size / int(latent.ty.shape[1])) ** 0.5
    return d.scaled(normed, long if d.structure.long_latents else 1.0)


def values_of(d: Decoder, out: Expr, weight: Given) -> Expr:
    """Sums of latents that attention returns [n, 2 * heads, width] -> the heads' values [n, heads * value_head_dim]."""
    s, n, width = d.structure, out.ty.shape[0], out.ty.shape[2]
    heads = s.num_attention_heads

    def table(out: te.Tensor) -> te.Tensor:
        def number(p: Any, j: Any) -> Any:
            return out[p // heads, p % heads * 2 + j // width, j % width].astype(d.operations.compute)

        return te.compute((n * heads, s.kv_lora_rank), number, name="latent_sums")

    made = _by_head(d, _alone(d, table, out), n, weight, "latent_values_proj")
    return d.builder.emit(relax.op.reshape(made, [n, heads * s.value_head_dim]))


def _latents(
    d: Decoder, q: Expr, latent: Expr, turned: Expr, weight: Given, positions: Callable[[], Expr] | None
) -> Expr:
    s, n = d.structure, q.ty.shape[0]
    heads, rank, rope = s.num_attention_heads, s.kv_lora_rank, s.rotary_dim or 0
    rest, (_, _, half) = s.qk_head_dim - rope, s.cache_heads

    def unturned(q: te.Tensor) -> te.Tensor:
        def number(p: Any, j: Any) -> Any:
            return q[p // heads, p % heads * (rest + rope) + j].astype(d.operations.compute)

        return te.compute((n * heads, rest), number, name="latent_queries")

    def to_turn(q: te.Tensor, turned: te.Tensor) -> te.Tensor:
        def number(i: Any, h: Any, j: Any) -> Any:
            query = q[i, tirx.min(h, heads - 1) * (rest + rope) + rest + j]
            return tirx.if_then_else(h < heads, query, turned[i, j])

        return te.compute((n, heads + 1, rope), number, name="latent_turned")

    def rows(queries: te.Tensor, latent: te.Tensor, *ends: te.Tensor) -> te.Tensor:
        zero = tirx.const(0, d.dtype)

        def number(i: Any, h: Any, j: Any) -> Any:
            row, at = h // 2, h % 2 * half + j
            query = queries[i * heads + tirx.min(row, heads - 1), tirx.min(at, rank - 1)].astype(d.dtype)
            first = tirx.if_then_else(row < heads, query, latent[i, tirx.min(at, rank - 1)])
            end = tirx.if_then_else(at < rank + rope, ends[0][i, row, tirx.max(at - rank, 0)], zero) if ends else zero
            return tirx.if_then_else(at < rank, first, end)

        return te.compute((n, 2 * heads + 2, half), number, name="latent_rows")

    queries = _by_head(d, _alone(d, unturned, q), n, weight, "latent_keys_proj")
    ends = [d.builder.emit_te(to_turn, q, turned, primfunc_name_hint="latent_turned")] if rope else []
    if ends and positions is not None:
        ends = [d.operations.rope(ends[0], positions(), inverse_frequencies(s), (heads + 1, 0), rotary(s))]
    return _alone(d, rows, queries, latent, *ends)


def _by_head(d: Decoder, x: Expr, n: Expr, weight: Given, role: str) -> Expr:
    """x [n * heads, K] -> [n * heads, N]: each head's rows times its own matrix of the stack [heads, N, K]."""
    heads = d.structure.num_attention_heads
    chosen = d.builder.emit_te(
        lambda: te.compute((n, heads), lambda i, h: h.astype("int32"), name="heads"), primfunc_name_hint="heads"
    )
    return d.operations.expert_linear(x, chosen, weight(role))


def _alone(d: Decoder, table: Callable[..., te.Tensor], *given: Expr) -> Expr:
    """As `emit_te`, fused with nothing: FuseTIR fails where n is several rows for each token."""
    name = table.__name__.strip("_")
    return d.builder.emit_te(table, *given, primfunc_name_hint=f"latent_{name}", primfunc_attrs={"op_pattern": 8})


def _whole(
    s: Structure, own: Structure, q: te.Tensor, turned: te.Tensor, kv: te.Tensor, *sinks: te.Tensor
) -> te.Tensor:
    heads, times = s.num_attention_heads, s.num_attention_heads // own.num_attention_heads
    width, rope, values = own.qk_head_dim, own.rotary_dim or 0, own.value_head_dim
    rest, both = width - rope, width + (values if own.query_gate else 0)
    zero = tirx.const(0, q.dtype)
    has_sinks = "sinks" in s.roles()

    def number(i: Any, h: Any, d: Any) -> Any:
        head, mine = h % heads // times, h % times == 0
        query, pair = head * both, head * (rest + values)
        of_query = tirx.if_then_else(d < rope, q[i, query + rest + d], q[i, query + d - rope])
        of_query = of_query if times == 1 else tirx.if_then_else(mine, of_query, zero)
        of_key = tirx.if_then_else(d < rope, turned[i, d], kv[i, pair + d - rope])
        of_both = tirx.if_then_else(h < heads, of_query, of_key)
        of_value = tirx.if_then_else(d < values, kv[i, pair + rest + d], zero)
        behind = zero
        if has_sinks:
            sink = tirx.if_then_else(mine, sinks[0][head], NO_SINK) if sinks else tirx.const(NO_SINK, "float32")
            last = tirx.all(h < heads, d == s.head_dim - 1)
            behind = tirx.if_then_else(last, sink.astype(q.dtype), zero)
        return tirx.if_then_else(h < 2 * heads, tirx.if_then_else(d < width, of_both, behind), of_value)

    return te.compute((q.shape[0], 3 * heads, s.head_dim), number, name="latent_heads")


def _gates(own: Structure, q: te.Tensor) -> te.Tensor:
    width, values = own.qk_head_dim, own.value_head_dim
    return te.compute(
        (q.shape[0], own.num_attention_heads * values),
        lambda i, j: q[i, j // values * (width + values) + width + j % values],
        name="latent_gates",
    )
