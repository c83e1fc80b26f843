"""The mixer of Mamba (Gu and Dao, arXiv 2312.00752) and Mamba-2 (Dao and Gu, arXiv 2405.21060).

Roles say what parameters do; `x` is [n, H] in float32, as in mlcbuild.models.recurrent.layers. Falcon Mamba (arXiv
2410.05355) norms steps, B and C besides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import relax

from mlcbuild.models.mixers import Mixer, mixer_of
from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent import mixing
from mlcbuild.models.recurrent.layers import Layer
from mlcbuild.models.recurrent.operations import Scanned, Slot
from mlcbuild.models.structure import Structure

_INPUTS, _STATE = 0, 1  # what a layer keeps: the convolution's last inputs, and the state of the scan


def slots(s: Structure) -> tuple[Slot, ...]:
    """What each layer keeps per sequence."""
    return kept(mixer_of(s))


def kept(m: Mixer) -> tuple[Slot, ...]:
    """The same of a mixer."""
    return Slot((m.taps - 1) * m.convolved), Slot(m.size * m.width)


def layer(at: Layer, x: Expr) -> Expr:
    """The layer's output [n, H]; `at.state.expression` then is the state after it."""
    return at.add(x, mixed(at, at.norm(x, "mixer_norm")))


def mixed(at: Layer, x: Expr) -> Expr:
    """What is added to the residual: [n, H]."""
    d, m = at.decoder, mixer_of(at.decoder.structure)
    inner = d.project(x, at.weight, "in")
    if scales := d.structure.mixer_scales:
        columns = np.repeat(np.array(scales, np.float32), [m.width, m.width, m.inner, m.inner, m.heads])
        inner = d.builder.emit(relax.op.multiply(inner, relax.const(columns)))
    out = _mamba(at, m, inner) if m.name == "mamba" else _mamba2(at, m, inner)
    return d.project(out, at.weight, "out")


def _mamba(at: Layer, m: Mixer, inner: Expr) -> Expr:
    s, emit, n = at.decoder.structure, at.decoder.builder.emit, inner.ty.shape[0]
    x, gate = parts(at, inner, [m.width] * 2)
    x = convolved(at, x)
    # Groups, which Zamba (arXiv 2405.16712) calls heads, have matrices of their own: each row is multiplied with its.
    every = relax.const(np.arange(m.groups, dtype=np.int32)[None])
    group = emit(relax.op.broadcast_to(every, relax.ShapeExpr([n, m.groups])))

    def product(rows: Expr, role: str) -> Expr:
        if m.groups == 1:
            return at.linear(rows, role)
        return at.decoder.operations.expert_linear(rows, group, at.weight(role))

    def reshaped(rows: Expr, shape: list[Expr]) -> Expr:
        return emit(relax.op.reshape(rows, shape)) if m.groups > 1 else rows

    rows = reshaped(x, [n * m.groups, m.width // m.groups])
    inputs = parts(at, product(rows, "step_in_proj"), [m.rank, m.size, m.size])
    if s.state_norm_eps is not None:
        inputs = [_normed(at, each, s.state_norm_eps) for each in inputs]
    pairs = zip(inputs, ("step_norm", "state_in_norm", "state_out_norm"), strict=True)
    step, b, c = (at.te(mixing.scaled, each, at.plain(role)) if role in at.weight else each for each, role in pairs)
    b, c = (reshaped(each, [n, m.inner]) for each in (b, c))
    return at.te(mixing.gated, _scanned(at, m, x, reshaped(product(step, "step_proj"), [n, m.width]), b, c), gate)


def _mamba2(at: Layer, m: Mixer, inner: Expr) -> Expr:
    gate, inner, step = parts(at, inner, [m.width, m.convolved, m.heads])
    x, b, c = parts(at, convolved(at, inner), [m.width, m.inner, m.inner])
    out, normed = _scanned(at, m, x, step, b, c), "state_norm" in at.weight
    if normed and at.decoder.structure.state_norm_first:
        return at.te(mixing.gated, _grouped_norm(at, m, out), gate)
    out = at.te(mixing.gated, out, gate)
    return _grouped_norm(at, m, out) if normed else out


def _grouped_norm(at: Layer, m: Mixer, x: Expr) -> Expr:
    """x [n, W] normed within each group of heads, with the weight `state_norm`."""
    d, n = at.decoder, x.ty.shape[0]
    each = d.builder.emit(relax.op.reshape(x, [n * m.groups, m.width // m.groups]))
    each = d.builder.emit(relax.op.reshape(_normed(at, each, d.structure.norm_eps), [n, m.width]))
    return at.te(mixing.scaled, each, at.plain("state_norm"))


def _normed(at: Layer, x: Expr, eps: float) -> Expr:
    """x [n, W] divided by the root mean square of each row."""
    ones = at.decoder.builder.emit(relax.op.ones([int(x.ty.shape[1])], at.decoder.dtype))
    return at.decoder.operations.rms_norm(x, ones, eps)


def parts(at: Layer, x: Expr, widths: Sequence[int], axis: int = 1) -> list[Expr]:
    """Neighbouring columns of x, or what `axis` counts, as many as `widths` say."""
    ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    parts = at.decoder.builder.emit(relax.op.split(x, ends, axis=axis))
    return [at.decoder.builder.emit(relax.TupleGetItem(parts, i)) for i in range(len(widths))]


def convolved(at: Layer, x: Expr, activated: bool = True) -> Expr:
    """x [n, C] after the layer's convolution."""
    bias = at.plain("convolution_bias") if "convolution_bias" in at.weight else None
    out, after = at.recurrence.convolve(x, at.plain("convolution"), bias, at.state.read(_INPUTS), activated)
    at.state.write(_INPUTS, after)
    return out


def _scanned(at: Layer, m: Mixer, x: Expr, step: Expr, b: Expr, c: Expr) -> Expr:
    limits = at.decoder.structure.time_step_limits
    scanned = Scanned(m.heads, m.dim, m.groups, m.size, limits, m.name == "mamba")
    given = (at.plain(role) for role in ("step_bias", "state_rate"))
    out, after = at.recurrence.scan(x, step, *given, b, c, at.plain("state_skip"), at.state.read(_STATE), scanned)
    at.state.write(_STATE, after)
    return out
