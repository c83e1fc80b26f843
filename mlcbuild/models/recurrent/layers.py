"""One layer of RWKV-4, -5 and -6: time mixing (the recurrence), then channel mixing.

Peng et al., arXiv 2305.13048 (RWKV-4) and 2404.05892 (Eagle and Finch, RWKV-5 and -6). Roles are named after the
checkpoints' modules; `x` is [n, H] in float32, the tokens of `state.batch` sequences, one sequence after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import relax

from mlcbuild.models.decoder import Decoder
from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent import mixing
from mlcbuild.models.recurrent.operations import Recurrence, Slot, State
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Given

# What a layer keeps: the last token before time mixing, the recurrence, and the last token before channel mixing.
_TIME = 0


@dataclass(frozen=True)
class Layer:
    """What the pieces of one layer share; `positions` of its tokens in their sequences: int32 [n], where known."""

    decoder: Decoder
    recurrence: Recurrence
    state: State
    weight: Given
    positions: Callable[[], Expr] | None = None

    def te(self, function: Callable[..., Any], *arguments: Any) -> Expr:
        name = getattr(function, "func", function).__name__
        return self.decoder.builder.emit_te(function, *arguments, primfunc_name_hint=name)

    def linear(self, x: Expr, role: str) -> Expr:
        return self.decoder.operations.linear(x, self.weight(role), self.decoder.operations.compute)

    def norm(self, x: Expr, role: str) -> Expr:
        return self.decoder.norm(x, self.weight, role)

    def plain(self, role: str) -> Expr:
        return self.weight(role).plain

    def flat(self, role: str) -> Expr:
        """A parameter as one vector."""
        return self.decoder.builder.emit(relax.op.reshape(self.plain(role), [-1]))

    def shifted(self, x: Expr, slot: int) -> Expr:
        """What `slot` keeps of the token before the first one: [b, H]. The last token of x takes its place."""
        last = self.state.read(slot)
        self.state.write(slot, self.te(mixing.last_rows, x, last))
        return last

    def add(self, x: Expr, y: Expr) -> Expr:
        return self.decoder.builder.emit(relax.op.add(x, y))


def slots(s: Structure) -> tuple[Slot, ...]:
    """What each layer keeps per sequence."""
    width = s.num_attention_heads * s.head_dim
    if s.kind == "rwkv4":
        # The exponent of an empty sum, low enough to vanish beside any other.
        return Slot(s.hidden_size), Slot(width), Slot(width), Slot(width, -1e30), Slot(s.hidden_size)
    return Slot(s.hidden_size), Slot(width * s.head_dim), Slot(s.hidden_size)


def layer(at: Layer, x: Expr) -> Expr:
    """The layer's output [n, H]; `at.state.expression` then is the state after it."""
    time_mixing, channel_mixing = _MIXING[at.decoder.structure.kind]
    x = at.add(x, time_mixing(at, at.norm(x, "attention_norm")))
    return at.add(x, channel_mixing(at, at.norm(x, "mlp_norm")))


def _time_4(at: Layer, x: Expr) -> Expr:
    last = at.shifted(x, _TIME)
    key, value, receptance = (
        at.linear(at.te(mixing.interpolated, x, last, at.plain(f"time_mix_{name}")), f"time_{name}_proj")
        for name in ("key", "value", "receptance")
    )
    before = [at.state.read(slot) for slot in (1, 2, 3)]
    out, *after = at.recurrence.wkv4(key, value, at.plain("time_decay"), at.plain("time_first"), before)
    for slot, value in zip((1, 2, 3), after, strict=True):
        at.state.write(slot, value)
    return at.linear(at.te(mixing.received, receptance, out), "time_output_proj")


def _time_5(at: Layer, x: Expr) -> Expr:
    last = at.shifted(x, _TIME)
    r, k, v, gate = (
        at.linear(at.te(mixing.interpolated, x, last, at.plain(f"time_mix_{name}")), f"time_{name}_proj")
        for name in ("receptance", "key", "value", "gate")
    )
    decay = at.decoder.builder.emit(relax.op.reshape(at.plain("time_decay"), [1, -1]))
    return _heads(at, r, k, v, gate, decay)


def _time_6(at: Layer, x: Expr) -> Expr:
    emit = at.decoder.builder.emit
    n = x.ty.shape[0]
    dx = at.te(mixing.difference, x, at.shifted(x, _TIME))
    inner = at.te(mixing.moved, x, dx, at.plain("time_maa_x"))
    inner = emit(relax.op.tanh(_project(at, inner, "time_maa_w1")))
    inner = emit(relax.op.reshape(inner, [n, inner.ty.shape[2]]))
    more = at.recurrence.project(inner, at.plain("time_maa_w2"))
    w, k, v, r, gate = (
        at.te(mixing.moved_by, x, dx, at.plain(f"time_maa_{name}"), more, part)
        for part, name in enumerate(("w", "k", "v", "r", "g"))
    )
    inner = emit(relax.op.tanh(_project(at, w, "time_decay_w1")))
    inner = emit(relax.op.reshape(inner, [n, inner.ty.shape[2]]))
    decay = at.te(mixing.decay, at.plain("time_decay"), _project(at, inner, "time_decay_w2"))
    names = ("receptance", "key", "value", "gate")
    r, k, v, gate = (at.linear(x, f"time_{name}_proj") for x, name in zip((r, k, v, gate), names, strict=True))
    return _heads(at, r, k, v, gate, decay)


def _heads(at: Layer, r: Expr, k: Expr, v: Expr, gate: Expr, decay: Expr) -> Expr:
    """The recurrence of all heads, each head's result normalised by itself, gated and brought back to H."""
    d, s = at.decoder, at.decoder.structure
    heads, dim = s.num_attention_heads, s.head_dim
    out, after = at.recurrence.wkv(r, k, v, decay, at.flat("time_faaaa"), at.state.read(1), heads)
    at.state.write(1, after)
    n = out.ty.shape[0]
    each = d.builder.emit(relax.op.reshape(out, [n * heads, dim]))
    each = d.operations.layer_norm(each, None, None, s.group_norm_eps)
    out = d.builder.emit(relax.op.reshape(each, [n, heads * dim]))
    out = at.te(mixing.scaled_and_gated, out, at.plain("time_norm"), at.plain("time_norm_bias"), gate)
    return at.linear(out, "time_output_proj")


def _project(at: Layer, x: Expr, role: str) -> Expr:
    """x [n, K] times a parameter [K, N]: [1, n, N]."""
    w = at.plain(role)
    depth, width = w.ty.shape
    return at.recurrence.project(x, at.decoder.builder.emit(relax.op.reshape(w, [1, depth, width])))


def _channels(at: Layer, x: Expr) -> Expr:
    last = at.shifted(x, len(slots(at.decoder.structure)) - 1)
    key, receptance = (
        at.te(mixing.interpolated, x, last, at.plain(f"channel_mix_{name}")) for name in ("key", "receptance")
    )
    return _gated(at, key, receptance)


def _channels_6(at: Layer, x: Expr) -> Expr:
    dx = at.te(mixing.difference, x, at.shifted(x, len(slots(at.decoder.structure)) - 1))
    key, receptance = (at.te(mixing.moved, x, dx, at.plain(f"channel_maa_{name}")) for name in ("k", "r"))
    return _gated(at, key, receptance)


def _gated(at: Layer, key: Expr, receptance: Expr) -> Expr:
    inner = at.te(mixing.squared_relu, at.linear(key, "channel_key_proj"))
    receptance = at.linear(receptance, "channel_receptance_proj")
    return at.te(mixing.received, receptance, at.linear(inner, "channel_value_proj"))


_MIXING = {"rwkv4": (_time_4, _channels), "rwkv5": (_time_5, _channels), "rwkv6": (_time_6, _channels_6)}
