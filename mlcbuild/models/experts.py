"""A mixture of experts in place of a layer's MLP: a few gated MLPs of many, chosen token by token.

y = sum over the chosen experts e of share_e * down_e(activation(gate_e(x)) * up_e(x)), and, where the model has shared
experts, what those make of every token, times sigmoid(shared_gate · x) where there is such a gate (Jiang et al.,
arXiv 2401.04088; Dai et al., arXiv 2401.06066). Routers compute in float32, as transformers' and MLC's do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import relax

from mlcbuild.models.operations import Expr
from mlcbuild.models.weights import Given

if TYPE_CHECKING:
    from mlcbuild.models.decoder import Decoder


def experts(d: Decoder, x: Expr, weight: Given) -> Expr:
    """x [n, H] -> [n, H], with a layer's parameters."""
    s, o = d.structure, d.operations
    logits = o.linear(x, weight("router"), "float32")
    chosen, share = o.choose_experts(logits, s.num_experts_per_tok, s.norm_topk_prob, s.routed_scaling_factor)
    inner = o.gated(o.expert_linear(x, chosen, weight("experts_gate_up_proj")), s.activation)
    out = o.weighted_sum(o.expert_linear(inner, chosen, weight("experts_down_proj")), share)
    if "shared_gate_up_proj" not in weight:
        return out
    shared = d.project(o.gated(d.project(x, weight, "shared_gate_up"), s.activation), weight, "shared_down")
    if "shared_gate" in weight:
        gate = d.builder.emit(relax.op.sigmoid(o.linear(x, weight("shared_gate"), o.compute)))
        shared = d.builder.emit(relax.op.multiply(gate, shared))
    return d.builder.emit(relax.op.add(out, shared))
