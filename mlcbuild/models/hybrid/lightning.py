"""Lightning attention (Qin et al., arXiv 2401.04658) as MiniMax-01 has it (arXiv 2501.08313).

A head keeps a matrix, lets it fade by the same share at every token, and adds the product of the token's key and value.
That is Mamba-2's scan with steps of 1. Roles say what parameters do; `x` is [n, H] in float32.
"""

from __future__ import annotations

import numpy as np
from tvm import relax, te

from mlcbuild.models.hybrid.delta import ungrouped
from mlcbuild.models.mixers import Mixer, mixer_of
from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent import mixing
from mlcbuild.models.recurrent.layers import Layer
from mlcbuild.models.recurrent.operations import Scanned, Slot

_STATE = 0
_EPS = 1e-6  # of the norm, whatever config.json's rms_norm_eps is (transformers modeling_minimax.py)


def slots(m: Mixer) -> tuple[Slot, ...]:
    """What each layer keeps per sequence: the matrices of its heads."""
    return (Slot(m.size * m.width),)


def mixed(at: Layer, x: Expr) -> Expr:
    """What is added to the residual: [n, H]."""
    d, m, n = at.decoder, mixer_of(at.decoder.structure), x.ty.shape[0]
    inner = d.operations.activation(at.linear(x, "in_proj"), d.structure.activation)
    q, k, v = ungrouped(at, inner, m.heads, [m.size, m.size, m.dim])
    zeros = relax.const(np.zeros(m.heads, np.float32))
    steps = d.builder.emit(relax.op.zeros([n, m.heads], "float32"))
    scanned = Scanned(m.heads, m.dim, m.groups, m.size, (1.0, 1.0), False)
    rate = at.te(_negative, at.flat("state_rate"))
    out, after = at.recurrence.scan(v, steps, zeros, rate, k, q, zeros, at.state.read(_STATE), scanned)
    at.state.write(_STATE, after)
    out = d.operations.rms_norm(out, at.plain("state_norm"), _EPS)
    return d.project(at.te(mixing.received, at.linear(x, "in_gate_proj"), out), at.weight, "out")


def _negative(slopes: te.Tensor) -> te.Tensor:
    return te.compute(slopes.shape, lambda h: -slopes[h], name="negative")
