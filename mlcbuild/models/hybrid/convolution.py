"""The short convolution of LFM2 (Liquid AI, arXiv 2511.23404): out(c * convolve(b * x)), all of them parts of in(h).

Roles say what parameters do; `x` is [n, H] in float32, as in mlcbuild.models.recurrent.layers.
"""

from __future__ import annotations

from tvm import relax

from mlcbuild.models.mixers import Mixer
from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent.layers import Layer
from mlcbuild.models.recurrent.operations import Slot
from mlcbuild.models.recurrent.state_space import convolved, parts


def slots(m: Mixer) -> tuple[Slot, ...]:
    """What each layer keeps per sequence: the convolution's last inputs."""
    return (Slot((m.taps - 1) * m.convolved),)


def mixed(at: Layer, x: Expr) -> Expr:
    """What is added to the residual: [n, H]."""
    d = at.decoder
    b, c, inner = parts(at, d.project(x, at.weight, "in"), [d.structure.hidden_size] * 3)
    inner = convolved(at, d.builder.emit(relax.op.multiply(b, inner)), activated=False)
    return d.project(d.builder.emit(relax.op.multiply(c, inner)), at.weight, "out")
