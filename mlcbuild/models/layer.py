"""One layer: attention and MLP, their norms, and how both are added to the residual."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import relax

from mlcbuild.models.attention import attention
from mlcbuild.models.mlp import mlp
from mlcbuild.models.operations import Expr
from mlcbuild.models.weights import Given

if TYPE_CHECKING:
    from mlcbuild.models.decoder import Decoder


def layer(decoder: Decoder, x: Expr, cache: Expr, layer_id: Expr, *given: Expr, number: int = 0) -> Expr:
    """One layer's computation on what `layer_inputs` describes: [n, H]. `number` is a layer of the same kind."""
    d, s = decoder, decoder.structure
    weight = Given([p for p in d.declared if p.layer == number], given)
    pre, post = s.norm_position != "post", s.norm_position != "pre"

    def returned(y: Expr, role: str) -> Expr:
        """What a block returns, as it is added."""
        y = d.norm(y, weight, role) if post else y
        return d.scaled(y, s.residual_scale)

    normed = d.norm(x, weight, "attention_norm") if pre else x
    attended = attention(d, normed, cache, layer_id, weight, x.ty.shape[0], number)
    x1 = d.builder.emit(relax.op.add(x, returned(attended, "attention_post_norm")))
    parallel = s.residual == "parallel"
    if not parallel:
        normed = d.norm(x1, weight, "mlp_norm") if pre else x1
    elif "mlp_norm" in weight:
        normed = d.norm(x, weight, "mlp_norm")
    return relax.op.add(x1, returned(mlp(d, normed, weight), "mlp_post_norm"))
