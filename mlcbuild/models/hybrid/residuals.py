"""What hybrids hand from layer to layer beside a hidden state: more of them, or what a router made.

Qwen4-Exp has several hidden states for a token, of which a part of a layer is given a mixture (its gated residuals).

`x` is [n, S * H], the states one after the other. Each is normed by itself. A narrow product of all of them says how
much of each number attention, or an MLP, is given of each state, and a product of S rows how much of what it returns is
added to each (hyper-connections; Zhu et al., arXiv 2409.19606). At the end a last mixture is what the head is given.
Source of the arithmetic: transformers modeling_qwen4_exp.py.
"""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx

from mlcbuild.models.decoder import Decoder
from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent import mixing
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Given, Weights


def width(s: Structure) -> int:
    """Of what goes from layer to layer."""
    return s.hidden_size * (s.streams if s.mixture_rank else 1) + s.router_width


def started(d: Decoder, x: Expr) -> Expr:
    """What the first layer is given [n, width]: the first hidden state [n, H] as every one, and zeros of routers."""
    s, parts = d.structure, [x]
    if s.router_width:
        parts.append(d.builder.emit(relax.op.zeros([x.ty.shape[0], s.router_width], "float32")))
    parts = [x] * s.streams if s.mixture_rank else parts
    return d.builder.emit(relax.op.concat(parts, axis=1)) if len(parts) > 1 else x


def ended(d: Decoder, x: Expr, weights: Weights) -> Expr:
    """What the last layer gives [n, width], as the head is given it [n, H]."""
    if d.structure.mixture_rank:
        return mixture(d, x, weights, "final")[0]
    return d.finished(apart(d, x)[0], weights)


def apart(d: Decoder, x: Expr) -> tuple[Expr, Expr | None]:
    """Hidden states of a token, and what the layer before's router made of it [n, R]."""
    if not d.structure.router_width:
        return x, None
    both = d.builder.emit(relax.op.split(x, [width(d.structure) - d.structure.router_width], axis=1))
    first, second = (d.builder.emit(relax.TupleGetItem(both, i)) for i in (0, 1))
    return first, second


def mixture(d: Decoder, x: Expr, weight: Given | Weights, part: str) -> tuple[Expr, Expr | None]:
    """What `part` (attention, mlp, final) is given of all states: [n, H]; what each state counts of what it returns."""
    s, compute = d.structure, d.operations.compute
    inner = normed(d, x, weight, f"{part}_mixture_norm")
    narrow = d.scaled(d.project(inner, weight, f"{part}_mixture_in"), 1 / s.streams)
    share = d.project(d.operations.activation(narrow, "silu"), weight, f"{part}_mixture_out")
    mixed = d.builder.emit_te(_mixed, inner, share, s.streams, primfunc_name_hint="mixture")
    if f"{part}_injection" not in weight:
        return mixed, None
    return mixed, d.scaled(d.operations.linear(inner, weight(f"{part}_injection"), compute), 1 / s.streams)


def normed(d: Decoder, x: Expr, weight: Given | Weights, role: str) -> Expr:
    """Each hidden state of x [n, S * H] normed by itself, with a weight for all of them."""
    s = d.structure
    rows = d.builder.emit(relax.op.reshape(x, [x.ty.shape[0] * s.streams, s.hidden_size]))
    rows = d.operations.rms_norm(rows, d.ones(s.hidden_size), s.norm_eps)
    rows = d.builder.emit(relax.op.reshape(rows, x.ty.shape))
    return d.builder.emit_te(mixing.scaled, rows, weight(role).plain, primfunc_name_hint="scaled")


def injected(d: Decoder, x: Expr, made: Expr, share: Expr) -> Expr:
    """All states [n, S * H] and what a part of the layer made [n, H], twice sigmoid(share) [n, S] times."""
    return d.builder.emit_te(_injected, x, made, share, primfunc_name_hint="injected")


def _mixed(x: te.Tensor, share: te.Tensor, streams: int) -> te.Tensor:
    size = int(x.shape[1]) // streams

    def number(i: Any, j: Any) -> Any:
        each = [te.sigmoid(share[i, at * size + j]) * x[i, at * size + j] for at in range(streams)]
        return sum(each[1:], each[0]) / tirx.const(streams, "float32")

    return te.compute((x.shape[0], size), number, name="mixture")


def _injected(x: te.Tensor, made: te.Tensor, share: te.Tensor) -> te.Tensor:
    size = int(made.shape[1])
    return te.compute(
        x.shape, lambda i, j: x[i, j] + made[i, j % size] * 2 * te.sigmoid(share[i, j // size]), name="injected"
    )
