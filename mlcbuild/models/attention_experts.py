"""Attention with experts: those that a token chooses make its queries, and project what these return (JetMoE).

Every expert has a query for each key head, so a key is read by as many queries as a token chooses experts. Shares of
experts count when their outputs are added. Source: Zhang et al., arXiv 2210.05144; Shen et al., arXiv 2404.07413.
"""

from __future__ import annotations

from tvm import relax

from mlcbuild.models.decoder import Decoder
from mlcbuild.models.operations import Expr
from mlcbuild.models.weights import Given

Choice = tuple[Expr, Expr]  # experts int32 [n, count], their shares float32 [n, count]


def choose(d: Decoder, x: Expr, weight: Given) -> Choice:
    """The experts of each token of x [n, H]."""
    logits = d.operations.linear(x, weight("attention_router"), "float32")
    return d.operations.choose_experts(logits, d.structure.num_experts_per_tok, True, 1.0)


def heads_of(d: Decoder, x: Expr, choice: Choice, weight: Given) -> Expr:
    """x [n, H] -> queries, keys and values [n, ...] in the model dtype, the queries of a key next to each other."""
    s, n = d.structure, x.ty.shape[0]
    made = d.operations.expert_linear(x, choice[0], weight("attention_experts_q_proj"))
    queries = _swapped(d, made, n, s.num_experts_per_tok, s.num_key_value_heads)
    both = [d.cast(queries, d.dtype), d.project(x, weight, "kv", d.dtype)]
    return d.builder.emit(relax.op.concat(both, axis=1))


def returned(d: Decoder, out: Expr, choice: Choice, weight: Given) -> Expr:
    """What heads return [n, heads * D] -> [n, H]."""
    s, n = d.structure, out.ty.shape[0]
    by_expert = _swapped(d, d.cast(out, d.operations.compute), n, s.num_key_value_heads, s.num_experts_per_tok)
    rows = d.builder.emit(relax.op.reshape(by_expert, [n * s.num_experts_per_tok, s.num_key_value_heads * s.head_dim]))
    made = d.operations.expert_linear(rows, choice[0], weight("attention_experts_o_proj"))
    total = d.operations.weighted_sum(made, choice[1])
    return d.builder.emit(relax.op.add(total, d.cast(weight("attention_experts_bias").plain, d.operations.compute)))


def _swapped(d: Decoder, x: Expr, n: Expr, outer: int, inner: int) -> Expr:
    """[n, outer * inner * D], or the same numbers -> [n, inner * outer * D]."""
    apart = d.builder.emit(relax.op.reshape(x, [n, outer, inner, d.structure.head_dim]))
    turned = d.builder.emit(relax.op.permute_dims(apart, [0, 2, 1, 3]))
    return d.builder.emit(relax.op.reshape(turned, [n, outer * inner * d.structure.head_dim]))
