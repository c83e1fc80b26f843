"""One layer of xLSTM (Beck et al., arXiv 2405.04517 and 2503.13427): a matrix memory with exponential gates, an MLP.

Roles say what parameters do; `x` is [n, H] in float32, as in mlcbuild.models.recurrent.layers. Arithmetic:
transformers modeling_xlstm.py.
"""

from __future__ import annotations

from tvm import relax, te, tirx

from mlcbuild.models.layer import mlp
from mlcbuild.models.mixers import mixer_of
from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent import mixing
from mlcbuild.models.recurrent.layers import Layer
from mlcbuild.models.recurrent.operations import Scanned, Slot
from mlcbuild.models.recurrent.state_space import parts
from mlcbuild.models.structure import Structure

_MEMORY, _TOP = 0, 1  # what a layer keeps: the memories of its heads, and the largest exponent of each


def slots(s: Structure) -> tuple[Slot, ...]:
    """What each layer keeps per sequence; a memory has one more column, the sum of keys."""
    m = mixer_of(s)
    return Slot(m.inner * (m.dim + 1)), Slot(m.heads)


def layer(at: Layer, x: Expr) -> Expr:
    """The layer's output [n, H]; `at.state.expression` then is the state after it."""
    x = at.add(x, mixed(at, at.norm(x, "mixer_norm")))
    return at.add(x, mlp(at.decoder, at.norm(x, "mlp_norm"), x, at.weight))


def mixed(at: Layer, x: Expr) -> Expr:
    """What is added to the residual: [n, H]."""
    d, s, m = at.decoder, at.decoder.structure, mixer_of(at.decoder.structure)
    inner, gate = parts(at, d.project(x, at.weight, "in"), [2 * m.inner + m.width, m.width])
    gates = d.biased(x, at.weight, "memory_gates", "memory_gates_bias", "float32")
    if s.gate_softcapping is not None:
        capped = d.builder.emit(relax.op.tanh(d.scaled(gates, 1 / s.gate_softcapping)))
        gates = d.scaled(capped, s.gate_softcapping)
    before = at.state.read(_MEMORY), at.state.read(_TOP)
    scanned = Scanned(m.heads, m.dim, m.groups, m.size, (0.0, 0.0), False)
    out, *after = at.recurrence.mlstm(inner, at.te(_logarithms, gates), *before, scanned)
    for slot, value in zip((_MEMORY, _TOP), after, strict=True):
        at.state.write(slot, value)
    heads = d.operations.layer_norm(at.te(_divided, out, m.heads), None, None, s.norm_eps)
    out = d.builder.emit(relax.op.reshape(heads, [x.ty.shape[0], m.width]))
    out = at.te(mixing.received, gate, at.te(mixing.scaled, out, at.plain("state_norm")))
    return d.project(out, at.weight, "out")


def _logarithms(gates: te.Tensor) -> te.Tensor:
    """Gates of writing, then of keeping [n, 2 * heads] -> their logarithms: of exp, and of sigmoid."""
    heads = gates.shape[1] // 2

    def value(i: tirx.Var, j: tirx.Var) -> Expr:
        return tirx.if_then_else(j < heads, gates[i, j], -mixing.softplus(-gates[i, j]))

    return te.compute(gates.shape, value, name="logarithms")


def _divided(read: te.Tensor, heads: int) -> te.Tensor:
    """[n, heads * (dim + 1)] -> [n * heads, dim]: each head's numbers divided by its last one."""
    columns = int(read.shape[1]) // heads

    def value(i: tirx.Var, j: tirx.Var) -> Expr:
        row, first = i // heads, i % heads * columns
        return read[row, first + j] / read[row, first + columns - 1]

    return te.compute((read.shape[0] * heads, columns - 1), value, name="divided")
