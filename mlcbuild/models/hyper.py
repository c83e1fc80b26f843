"""Hyper-connections: several hidden states for a token, out of which attention and MLP are each given one (Zhu et al.,
arXiv 2409.19606).

`x` is [n, S * H], the states one after the other. Of x, divided by its root mean square, a matrix (`attention_mix`,
`mlp_mix`) makes S weights by which states are added to one, and S by which what is made of that is added to each.
States are kept as they are: independent hyper-connections, as transformers modeling_hy_v4.py has them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import relax, te, tirx

from mlcbuild.models.decoder import Decoder
from mlcbuild.models.operations import Expr
from mlcbuild.models.streams import mean_square
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Given, Weights


def started(d: Decoder, x: Expr) -> Expr:
    """[n, H] -> as many states, all alike [n, S * H]."""
    return d.builder.emit(relax.op.concat([x] * d.structure.streams, axis=1))


def ended(d: Decoder, x: Expr, weights: Given | Weights) -> Expr:
    """All states -> one [n, H]."""
    return _one(d, x, _weights(d, x, weights, "head"))


def around(d: Decoder, x: Expr, weight: Given, part: str, block: Callable[[Expr], Expr]) -> Expr:
    """All states, and what `block`, [n, H] -> [n, H], makes of one that is made of them [n, S * H]."""
    mixed = _weights(d, x, weight, part)
    made = block(_one(d, x, mixed))
    return d.builder.emit_te(_added, x, made, mixed, primfunc_name_hint="streams_added")


def _weights(d: Decoder, x: Expr, weight: Given | Weights, part: str) -> Expr:
    """float32 [n, 2 * S], or [n, S] before the head: of states, and of what is made of them."""
    mixes = d.operations.linear(x, weight(f"{part}_mix"), "float32")
    numbers = [weight(f"{part}_mix_{end}").plain for end in ("scale", "bias")]
    table = partial(_mixed, d.structure)
    return d.builder.emit_te(table, mixes, mean_square(d, x), *numbers, primfunc_name_hint="streams_mixed")


def _mixed(s: Structure, mixes: te.Tensor, square: te.Tensor, scale: te.Tensor, bias: te.Tensor) -> te.Tensor:
    most, least, eps = (tirx.const(each, "float32") for each in (s.hyper_magnitude, s.hyper_eps, s.norm_eps))

    def number(i: Any, j: Any) -> Any:
        normed = mixes[i, j] * tirx.rsqrt(square[i, 0] + eps)
        part = tirx.sigmoid(normed * scale[j // s.streams] + bias[j])
        return tirx.if_then_else(j < s.streams, part, most * part) + least

    return te.compute(mixes.shape, number, name="streams_mixed")


def _one(d: Decoder, x: Expr, mixed: Expr) -> Expr:
    return d.builder.emit_te(_sum, x, mixed, d.structure.streams, primfunc_name_hint="streams_summed")


def _sum(x: te.Tensor, mixed: te.Tensor, streams: int) -> te.Tensor:
    size = int(x.shape[1]) // streams

    def number(i: Any, j: Any) -> Any:
        return sum(mixed[i, k] * x[i, k * size + j].astype("float32") for k in range(streams)).astype(x.dtype)

    return te.compute((x.shape[0], size), number, name="streams_summed")


def _added(x: te.Tensor, made: te.Tensor, mixed: te.Tensor) -> te.Tensor:
    size, streams = int(made.shape[1]), int(x.shape[1]) // int(made.shape[1])

    def number(i: Any, j: Any) -> Any:
        more = mixed[i, streams + j // size] * made[i, j % size].astype("float32")
        return (x[i, j].astype("float32") + more).astype(x.dtype)

    return te.compute(x.shape, number, name="streams_added")
