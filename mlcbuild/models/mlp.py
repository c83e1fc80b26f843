"""The MLP of one layer, from normed hidden states to what is added to the residual."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import relax

from mlcbuild.models.experts import experts
from mlcbuild.models.operations import Expr
from mlcbuild.models.weights import Given

if TYPE_CHECKING:
    from mlcbuild.models.decoder import Decoder


def mlp(d: Decoder, x: Expr, weight: Given) -> Expr:
    """x [n, H] -> [n, H]: gated, with gate and up as one matrix or as two (Shazeer, arXiv 2002.05202), or plain.

    Experts, where the layer has a router to choose among them.
    """
    if "router" in weight:
        return experts(d, x, weight)
    operations, activation = d.operations, d.structure.activation
    if "gate_up_proj" in weight:
        both = d.project(x, weight, "gate_up")
        if d.structure.gate == "first":
            inner = operations.gated(both, activation)
        else:
            halves = d.builder.emit(relax.op.split(both, 2, axis=1))
            up, gate = (d.builder.emit(relax.TupleGetItem(halves, i)) for i in range(2))
            inner = d.builder.emit(relax.op.multiply(operations.activation(gate, activation), up))
    elif "gate_proj" in weight:
        gate = operations.activation(d.project(x, weight, "gate"), activation)
        inner = d.builder.emit(relax.op.multiply(gate, d.project(x, weight, "up")))
    else:
        inner = operations.activation(d.project(x, weight, "up"), activation)
    return d.project(inner, weight, "down")
