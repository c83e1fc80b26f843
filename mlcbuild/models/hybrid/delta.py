"""The gated delta net (Yang et al., arXiv 2412.06464) as Qwen3-Next and Qwen 3.5 have it, and Kimi Linear's.

A head keeps a matrix that maps keys to values. Each token lets it fade, and moves what it maps the token's key to
towards the token's value. In Kimi Linear's (arXiv 2510.26692) every key dimension fades by itself. Roles say what
parameters do; `x` is [n, H] in float32, as in mlcbuild.models.recurrent.layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tvm import relax, te, tirx

from mlcbuild.models.mixers import Mixer, mixer_of
from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent import mixing
from mlcbuild.models.recurrent.layers import Layer
from mlcbuild.models.recurrent.operations import Scanned
from mlcbuild.models.recurrent.state_space import convolved, parts

_STATE = 1  # what a layer keeps: the convolution's last inputs, and the matrices of its heads


def mixed(at: Layer, x: Expr) -> Expr:
    """What is added to the residual: [n, H]."""
    d, m = at.decoder, mixer_of(at.decoder.structure)
    each = m.name == "kda"
    inner, gate, step, beta = _grouped(at, m, x) if "grouped_in_proj" in at.weight else _inputs(at, m, x)
    lowest = d.structure.decay_limit
    decay = at.te(
        faded if lowest is None else partial(bounded, lowest), step, at.plain("step_bias"), at.flat("state_rate")
    )
    beta = d.scaled(d.builder.emit(relax.op.sigmoid(beta)), d.structure.beta_scale)
    scanned = Scanned(m.heads, m.dim, m.groups, m.size, (0.0, 0.0), each)
    out, after = at.recurrence.delta(convolved(at, inner), decay, beta, at.state.read(_STATE), scanned)
    at.state.write(_STATE, after)
    n = out.ty.shape[0]
    heads = d.builder.emit(relax.op.reshape(out, [n * m.heads, m.dim]))
    heads = d.operations.rms_norm(heads, at.plain("state_norm"), d.structure.state_norm_eps or d.structure.norm_eps)
    out = d.builder.emit(relax.op.reshape(heads, [n, m.width]))
    sigmoid = each or d.structure.state_gate == "sigmoid"
    out = at.te(mixing.received, gate, out) if sigmoid else at.te(mixing.gated, out, gate)
    return d.project(out, at.weight, "out")


def _inputs(at: Layer, m: Mixer, x: Expr) -> list[Expr]:
    """Queries, keys and values; gates; what gates keeping, and writing. One matrix may have all."""
    if "joined_in_proj" in at.weight:
        widths = [m.convolved, m.width, m.heads, m.heads]
        inner, gate, beta, step = parts(at, at.linear(x, "joined_in_proj"), widths)
        return [inner, gate, step, beta]
    if "gate_a_proj" in at.weight:
        gate, step = (at.linear(at.linear(x, f"{name}_a_proj"), f"{name}_b_proj") for name in ("gate", "step"))
        return [at.linear(x, "in_proj"), gate, step, at.linear(x, "in_beta_proj")]
    return [at.linear(x, f"{role}_proj") for role in ("in", "in_gate", "in_step", "in_beta")]


def _grouped(at: Layer, m: Mixer, x: Expr) -> list[Expr]:
    """The same where each group of heads has all of its inputs next to each other."""
    shared = m.heads // m.groups
    q, k, v, gate = ungrouped(
        at, at.linear(x, "grouped_in_proj"), m.groups, (m.size, m.size, shared * m.dim, shared * m.dim)
    )
    beta, step = ungrouped(at, at.linear(x, "grouped_step_proj"), m.groups, (shared, shared))
    return [at.decoder.builder.emit(relax.op.concat([q, k, v], axis=1)), gate, step, beta]


def ungrouped(at: Layer, x: Expr, groups: int, widths: Sequence[int]) -> list[Expr]:
    """x [n, groups * sum(widths)] as arrays [n, groups * width]."""
    emit, n = at.decoder.builder.emit, x.ty.shape[0]
    pieces = parts(at, emit(relax.op.reshape(x, [n, groups, sum(widths)])), widths, axis=2)
    return [emit(relax.op.reshape(each, [n, groups * width])) for each, width in zip(pieces, widths, strict=True)]


def faded(step: te.Tensor, bias: te.Tensor, rate: te.Tensor) -> te.Tensor:
    """exp(-exp(rate) softplus(step + bias)) [n, W]; bias: [W], rate: [heads], one for neighbouring columns."""
    shared = step.shape[1] // rate.shape[0]

    def value(i: tirx.Var, j: tirx.Var) -> Expr:
        return te.exp(-te.exp(rate[j // shared]) * mixing.softplus(step[i, j] + bias[j]))

    return te.compute(step.shape, value, name="faded")


def bounded(lowest: float, step: te.Tensor, bias: te.Tensor, rate: te.Tensor) -> te.Tensor:
    """exp(lowest sigmoid(exp(rate) (step + bias))) [n, W], as in `faded`: no less than exp(lowest) (Ling 3's)."""
    shared = step.shape[1] // rate.shape[0]

    def value(i: tirx.Var, j: tirx.Var) -> Expr:
        opened = te.sigmoid(te.exp(rate[j // shared]) * (step[i, j] + bias[j]))
        return te.exp(tirx.const(lowest, "float32") * opened)

    return te.compute(step.shape, value, name="faded")
