"""The recurrent block of Griffin and RecurrentGemma (De et al., arXiv 2402.19427, 2.4): a gated linear recurrence.

out(activation(in_gate(h)) * lru(convolve(in(h)))). Roles say what parameters do; `x` is [n, H] in float32, as in
mlcbuild.models.recurrent.layers.
"""

from __future__ import annotations

from tvm import relax, te, tirx

from mlcbuild.models.mixers import Mixer
from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent import mixing
from mlcbuild.models.recurrent.layers import Layer
from mlcbuild.models.recurrent.operations import Slot
from mlcbuild.models.recurrent.state_space import convolved

_STATE = 1  # what a layer keeps: the convolution's last inputs, and a number for each channel
_C = 8.0  # c of the paper's equation 3


def slots(m: Mixer) -> tuple[Slot, ...]:
    """What each layer keeps per sequence."""
    return Slot((m.taps - 1) * m.convolved), Slot(m.width)


def mixed(at: Layer, x: Expr) -> Expr:
    """What is added to the residual: [n, H]."""
    d, lru = at.decoder, at.recurrence.lru
    assert at.positions is not None
    gate = d.operations.activation(d.project(x, at.weight, "in_gate"), d.structure.activation)
    inner = convolved(at, d.project(x, at.weight, "in"), activated=False)
    reads, keeps = (
        at.recurrence.lru_gates(inner, at.plain(f"{name}_gate"), at.flat(f"{name}_gate_bias"))
        for name in ("read", "keep")
    )
    decay = at.te(_decay, keeps, at.plain("state_rate"))
    entering = at.te(_entering, inner, reads, keeps, at.plain("state_rate"), at.positions())
    out, after = lru(entering, decay, at.state.read(_STATE))
    at.state.write(_STATE, after)
    return d.project(d.builder.emit(relax.op.multiply(out, gate)), at.weight, "out")


def _logarithm(keeps: te.Tensor, rate: te.Tensor, i: tirx.Var, j: tirx.Var) -> Expr:
    return -_C * keeps[i, j] * mixing.softplus(rate[j])


def _decay(keeps: te.Tensor, rate: te.Tensor) -> te.Tensor:
    """exp(-c keeps softplus(rate)) [n, W]"""
    return te.compute(keeps.shape, lambda i, j: te.exp(_logarithm(keeps, rate, i, j)), name="decay")


def _entering(x: te.Tensor, reads: te.Tensor, keeps: te.Tensor, rate: te.Tensor, positions: te.Tensor) -> te.Tensor:
    """reads x sqrt(1 - decay ** 2) [n, W]; a text's first token enters whole."""

    def value(i: tirx.Var, j: tirx.Var) -> Expr:
        part = te.sqrt(1 - te.exp(2 * _logarithm(keeps, rate, i, j)))
        return x[i, j] * reads[i, j] * tirx.if_then_else(positions[i] == 0, tirx.const(1, "float32"), part)

    return te.compute(x.shape, value, name="entering")
