"""The mixer of Mamba (Gu and Dao, arXiv 2312.00752) and Mamba-2 (Dao and Gu, arXiv 2405.21060).

Roles say what parameters do; `x` is [n, H] in float32, as in mlcbuild.models.recurrent.layers. Falcon Mamba (arXiv
2410.05355) norms steps, B and C besides.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import relax

from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent import mixing
from mlcbuild.models.recurrent.layers import Layer
from mlcbuild.models.recurrent.operations import Scanned, Slot
from mlcbuild.models.structure import Structure

_INPUTS, _STATE = 0, 1  # what a layer keeps: the convolution's last inputs, and the state of the scan


def slots(s: Structure) -> tuple[Slot, ...]:
    """What each layer keeps per sequence."""
    width = s.num_attention_heads * s.head_dim
    convolved = width if s.kind == "mamba" else width + 2 * s.num_key_value_heads * s.state_size
    return Slot((s.conv_kernel - 1) * convolved), Slot(s.state_size * width)


def layer(at: Layer, x: Expr) -> Expr:
    """The layer's output [n, H]; `at.state.expression` then is the state after it."""
    d = at.decoder
    inner = d.project(at.norm(x, "mixer_norm"), at.weight, "in")
    out = _mamba(at, inner) if d.structure.kind == "mamba" else _mamba2(at, inner)
    return at.add(x, d.project(out, at.weight, "out"))


def _mamba(at: Layer, inner: Expr) -> Expr:
    s = at.decoder.structure
    x, gate = _parts(at, inner, [s.num_attention_heads] * 2)
    x = _convolved(at, x)
    step, b, c = _parts(at, at.linear(x, "step_in_proj"), [s.time_step_rank, s.state_size, s.state_size])
    if s.state_norm_eps is not None:
        step, b, c = (_normed(at, each, s.state_norm_eps) for each in (step, b, c))
    return at.te(mixing.gated, _scanned(at, x, at.linear(step, "step_proj"), b, c), gate)


def _mamba2(at: Layer, inner: Expr) -> Expr:
    d, s = at.decoder, at.decoder.structure
    width, groups = s.num_attention_heads * s.head_dim, s.num_key_value_heads
    both = [groups * s.state_size] * 2
    gate, convolved, step = _parts(at, inner, [width, width + sum(both), s.num_attention_heads])
    x, b, c = _parts(at, _convolved(at, convolved), [width, *both])
    out = at.te(mixing.gated, _scanned(at, x, step, b, c), gate)
    n = out.ty.shape[0]
    each = d.builder.emit(relax.op.reshape(out, [n * groups, width // groups]))
    each = d.builder.emit(relax.op.reshape(_normed(at, each, s.norm_eps), [n, width]))
    return at.te(mixing.scaled, each, at.plain("state_norm"))


def _normed(at: Layer, x: Expr, eps: float) -> Expr:
    """x [n, W] divided by the root mean square of each row."""
    ones = at.decoder.builder.emit(relax.op.ones([int(x.ty.shape[1])], at.decoder.dtype))
    return at.decoder.operations.rms_norm(x, ones, eps)


def _parts(at: Layer, x: Expr, widths: Sequence[int]) -> list[Expr]:
    """Neighbouring columns of x, as many as `widths` say."""
    ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    parts = at.decoder.builder.emit(relax.op.split(x, ends, axis=1))
    return [at.decoder.builder.emit(relax.TupleGetItem(parts, i)) for i in range(len(widths))]


def _convolved(at: Layer, x: Expr) -> Expr:
    bias = at.plain("convolution_bias") if "convolution_bias" in at.weight else None
    out, after = at.recurrence.convolve(x, at.plain("convolution"), bias, at.state.read(_INPUTS))
    at.state.write(_INPUTS, after)
    return out


def _scanned(at: Layer, x: Expr, step: Expr, b: Expr, c: Expr) -> Expr:
    s = at.decoder.structure
    scanned = Scanned(
        s.num_attention_heads, s.head_dim, s.num_key_value_heads, s.state_size, s.time_step_limits, s.kind == "mamba"
    )
    given = (at.plain(role) for role in ("step_bias", "state_rate"))
    out, after = at.recurrence.scan(x, step, *given, b, c, at.plain("state_skip"), at.state.read(_STATE), scanned)
    at.state.write(_STATE, after)
    return out
