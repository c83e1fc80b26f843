"""Layers with experts: a few MLPs of many, gated or plain, chosen token by token."""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import relax, te, tirx

from mlcbuild.models.decoder import Decoder
from mlcbuild.models.operations import Expr
from mlcbuild.models.routers import choose, zero_experts
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Given


def beside(d: Decoder, dense: Expr, x: Expr, weight: Given) -> Expr:
    """What a plain MLP returns and what experts make of x [n, H], each normed, added (Gemma 4's): [n, H]."""
    routed = d.norm(x, weight, "router_norm")
    made = d.norm(experts(d, d.norm(x, weight, "experts_norm"), routed, weight), weight, "experts_post_norm")
    return d.builder.emit(relax.op.add(d.norm(dense, weight, "dense_post_norm"), made))


def experts(d: Decoder, x: Expr, routed: Expr, weight: Given) -> Expr:
    """x [n, H] -> [n, H]; the router is given `routed` [n, H].

    y = sum over the chosen experts e of share_e * down_e(activation(gate_e(x)) * up_e(x)), plain ones without gate_e,
    and, where the model has
    shared experts, what those make of every token, times sigmoid(shared_gate · x) where there is such a gate (Jiang et
    al., arXiv 2401.04088; Dai et al., arXiv 2401.06066). Routers compute in float32,
    as transformers' and MLC's do (mlcbuild.models.routers). Routed experts may work in a narrower space than the
    model's: `experts_in_proj` leads there, `experts_out_proj` back (Nemotron 3).
    """
    s, o = d.structure, d.operations
    logits = d.scaled(o.linear(routed, weight("router"), "float32"), s.router_scale)
    if "router_bias" in weight:
        logits = d.builder.emit(relax.op.add(logits, d.cast(weight("router_bias").plain, "float32")))
    if s.router_logit_softcapping is not None:
        cap = s.router_logit_softcapping
        logits = d.scaled(d.builder.emit(relax.op.tanh(d.scaled(logits, 1 / cap))), cap)
    if s.scoring == "softmax" and s.expert_groups == 1 and "router_correction" not in weight:
        chosen, share = o.choose_experts(logits, s.num_experts_per_tok, s.norm_topk_prob, s.routed_scaling_factor)
    else:
        chosen, share = choose(d, logits, weight)
    if "expert_scale" in weight:
        share = d.builder.emit_te(_times_scale, share, chosen, weight("expert_scale").plain)
    kept = None
    if s.zero_experts:
        chosen, share, kept = zero_experts(d, x, chosen, share)
        kept = kept if s.zero_experts_return else None
    given = d.project(x, weight, "experts_in") if "experts_in_proj" in weight else x
    if s.expert_input_scaled:
        given = d.builder.emit_te(_times_share, given, share, primfunc_name_hint="expert_inputs")
        share = d.builder.emit(relax.op.ones_like(share))
    if "experts_up_proj" in weight:
        inner = o.activation(_product(d, given, chosen, weight, "experts_up"), s.activation)
    else:
        inner = gated(d, _product(d, given, chosen, weight, "experts_gate_up"), d.structure.swiglu_limit)
    out = o.weighted_sum(_product(d, inner, chosen, weight, "experts_down"), share)
    out = d.project(out, weight, "experts_out") if "experts_out_proj" in weight else out
    if "experts_sum_bias" in weight:
        out = d.builder.emit(relax.op.add(out, d.cast(weight("experts_sum_bias").plain, o.compute)))
    out = out if kept is None else d.builder.emit(relax.op.add(out, kept))
    if "shared_down_proj" not in weight:
        return out
    if "shared_up_proj" in weight:
        inner = o.activation(d.project(x, weight, "shared_up"), s.activation)
    else:
        inner = gated(d, d.project(x, weight, "shared_gate_up"), s.swiglu_limit if s.swiglu_dense else None)
    shared = d.project(inner, weight, "shared_down")
    if "shared_gate" in weight:
        gate = d.builder.emit(relax.op.sigmoid(o.linear(x, weight("shared_gate"), o.compute)))
        shared = d.builder.emit(relax.op.multiply(gate, shared))
    return d.scaled(d.builder.emit(relax.op.add(out, shared)), 0.5 if s.experts_averaged else 1.0)


def gated(d: Decoder, both: Expr, limit: float | None) -> Expr:
    """Gate and up [n, 2 * I] -> [n, I], clamped where there is a `limit`."""
    if limit is None:
        return d.operations.gated(both, d.structure.activation)
    return d.builder.emit_te(partial(_clamped, d.structure), both, primfunc_name_hint="clamped")


def _clamped(s: Structure, both: te.Tensor) -> te.Tensor:
    """gpt-oss's (transformers modeling_gpt_oss.py): Structure.swiglu_limit."""
    width = int(both.shape[1]) // 2
    limit, one, offset = (tirx.const(number, "float32") for number in (s.swiglu_limit, 1, s.swiglu_offset))

    def number(i: Any, j: Any) -> Any:
        gate = tirx.min(both[i, j].astype("float32"), limit)
        up = tirx.max(tirx.min(both[i, width + j].astype("float32"), limit), -limit)
        share = one / (one + tirx.exp(gate * tirx.const(-s.swiglu_alpha, "float32")))
        return ((up + offset) * gate * share).astype(both.dtype)

    return te.compute((both.shape[0], width), number, name="clamped")


def _times_scale(share: te.Tensor, chosen: te.Tensor, scale: te.Tensor) -> te.Tensor:
    """Shares float32 [n, count] times the number of each expert that was chosen."""
    return te.compute(
        share.shape, lambda i, c: share[i, c] * scale[chosen[i, c]].astype("float32"), name="expert_scales"
    )


def _times_share(x: te.Tensor, share: te.Tensor) -> te.Tensor:
    """[n, H] -> each row for each choice, times its share: [n * count, H]."""
    n, count = share.shape

    def number(p: Any, j: Any) -> Any:
        return (x[p // count, j].astype("float32") * share[p // count, p % count]).astype(x.dtype)

    return te.compute((n * count, x.shape[1]), number, name="expert_inputs")


def _product(d: Decoder, x: Expr, chosen: Expr, weight: Given, name: str) -> Expr:
    """Each token's row, or its row for each choice, times the matrices of the experts that it chose, plus biases."""
    out = d.operations.expert_linear(x, chosen, weight(f"{name}_proj"))
    if f"{name}_bias" not in weight:
        return out
    return d.builder.emit_te(_biased, out, chosen, weight(f"{name}_bias").plain, primfunc_name_hint="expert_bias")


def _biased(x: te.Tensor, chosen: te.Tensor, bias: te.Tensor) -> te.Tensor:
    count = chosen.shape[1]
    return te.compute(
        x.shape, lambda p, j: x[p, j] + bias[chosen[p // count, p % count], j].astype(x.dtype), name="expert_bias"
    )
