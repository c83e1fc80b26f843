"""Several hidden states for a token, of which layers compute one: AltUp (Baykal et al., arXiv 2301.13310; Gemma 3n).

`x` is [n, S * H], the states one after the other. A layer predicts all of them by small matrices that the first makes,
computes with the first, and corrects all by what it made of it. LAuReL (arXiv 2411.07501), a product of two narrow
matrices, is added beside attention. Source of the arithmetic: transformers modeling_gemma3n.py.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

from tvm import relax, te, tirx

from mlcbuild.models import per_layer
from mlcbuild.models.decoder import Decoder
from mlcbuild.models.operations import Expr
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Given, Weights

Part = Callable[[Expr], Expr]  # attention or MLP: [n, H] -> [n, H]
_LEAST = 1e-5  # a mean square that states are divided by the root of


def width(s: Structure) -> int:
    """Of what goes from layer to layer."""
    return s.streams * s.hidden_size


def started(d: Decoder, x: Expr, weights: Weights) -> Expr:
    """The first state [n, H] -> all of them [n, S * H]: products with a matrix for each, as long as the first."""
    if d.structure.streams == 1:
        return x
    return _joined(d, [x, *(_as_long(d, each, x) for each in _parts(d, d.project(x, weights, "streams")))])


def ended(d: Decoder, x: Expr, weights: Weights) -> Expr:
    """All states -> one [n, H]: the mean of the first and of products of the others, as long as the first."""
    s = d.structure
    if s.streams == 1:
        return x
    first, *others = _parts(d, x)
    total = first
    for number, each in enumerate(others, 1):
        made = d.project(each, weights, f"streams_out_{number}")
        total = d.builder.emit(relax.op.add(total, _as_long(d, made, first)))
    return d.scaled(total, 1 / s.streams)


def layer(d: Decoder, x: Expr, weight: Given, given: Expr, attend: Part, mlp: Part) -> Expr:
    """One layer on all states [n, S * H]; `given` is what the layer has of a token's own numbers [n, P]."""
    s, emit = d.structure, d.builder.emit
    coefficients = d.operations.linear(_modalities(d, _parts(d, x)[0], weight), weight("streams_predict"), "float32")
    predicted = d.builder.emit_te(_predicted, x, coefficients, s.streams, primfunc_name_hint="predicted")
    active = _parts(d, predicted)[0]
    normed = d.norm(active, weight, "attention_norm")
    narrow = d.project(d.project(normed, weight, "laurel_in"), weight, "laurel_out")
    laurel = emit(relax.op.add(normed, d.norm(narrow, weight, "laurel_norm")))
    attended = emit(relax.op.add(active, d.norm(attend(normed), weight, "attention_post_norm")))
    x1 = d.scaled(emit(relax.op.add(attended, laurel)), 2**-0.5)
    x2 = emit(relax.op.add(x1, d.norm(mlp(d.norm(x1, weight, "mlp_norm")), weight, "mlp_post_norm")))
    coefficients = d.operations.linear(_modalities(d, x2, weight), weight("streams_correct"), "float32")
    corrected = d.builder.emit_te(_corrected, predicted, x2, coefficients, primfunc_name_hint="corrected")
    first, *others = _parts(d, corrected)
    scaled = emit(relax.op.multiply(first, d.cast(weight("streams_scale").plain, d.operations.compute)))
    more = per_layer.made(d, scaled, given, weight)
    return _joined(d, [first, *(emit(relax.op.add(each, more)) for each in others)])


def cut(d: Decoder, both: Expr, sparsity: float) -> Expr:
    """Gates and ups [n, 2 * I] with a gate only where it is above so large a part of the normal distribution of all."""
    emit, deviations = d.builder.emit, NormalDist().inv_cdf(sparsity)
    halves = emit(relax.op.split(both, 2, axis=1))
    gate, up = (emit(relax.TupleGetItem(halves, i)) for i in (0, 1))
    gate = d.cast(gate, "float32")
    mean = emit(relax.op.mean(gate, 1, keepdims=True))
    spread = emit(relax.op.sqrt(mean_square(d, emit(relax.op.subtract(gate, mean)))))
    bound = emit(relax.op.add(mean, d.scaled(spread, deviations)))
    above = emit(relax.op.nn.relu(emit(relax.op.subtract(gate, bound))))
    return _joined(d, [d.cast(above, str(up.ty.dtype)), up])


def _parts(d: Decoder, x: Expr) -> list[Expr]:
    count = int(x.ty.shape[1]) // d.structure.hidden_size
    parts = d.builder.emit(relax.op.split(x, count, axis=1))
    return [d.builder.emit(relax.TupleGetItem(parts, i)) for i in range(count)]


def _joined(d: Decoder, parts: list[Expr]) -> Expr:
    return d.builder.emit(relax.op.concat(parts, axis=1))


def _as_long(d: Decoder, x: Expr, first: Expr) -> Expr:
    emit = d.builder.emit
    mine = emit(relax.op.maximum(mean_square(d, x), relax.const(_LEAST, "float32")))
    factor = emit(relax.op.sqrt(emit(relax.op.divide(mean_square(d, first), mine))))
    return d.cast(emit(relax.op.multiply(d.cast(x, "float32"), factor)), str(x.ty.dtype))


def mean_square(d: Decoder, x: Expr) -> Expr:
    """Of each row: float32 [n, 1]. A square of a state is more than float16 holds."""
    wide = d.cast(x, "float32")
    return d.builder.emit(relax.op.mean(d.builder.emit(relax.op.multiply(wide, wide)), 1, keepdims=True))


def _modalities(d: Decoder, x: Expr, weight: Given) -> Expr:
    """[n, H] -> [n, S] between -1 and 1."""
    normed = d.scaled(d.norm(x, weight, "streams_norm"), 1 / d.structure.hidden_size)
    return d.builder.emit(relax.op.tanh(d.operations.linear(normed, weight("streams_router"), "float32")))


def _predicted(x: te.Tensor, coefficients: te.Tensor, streams: int) -> te.Tensor:
    size = int(x.shape[1]) // streams

    def number(i: Any, j: Any) -> Any:
        total = x[i, j].astype("float32")
        for other in range(streams):
            wide = x[i, other * size + j % size].astype("float32")
            total += wide * coefficients[i, j // size * streams + other]
        return total.astype(x.dtype)

    return te.compute(x.shape, number, name="predicted")


def _corrected(predicted: te.Tensor, made: te.Tensor, coefficients: te.Tensor) -> te.Tensor:
    size, one = int(made.shape[1]), tirx.const(1, "float32")

    def number(i: Any, j: Any) -> Any:
        before = predicted[i, j].astype("float32")
        news = made[i, j % size].astype("float32") - predicted[i, j % size].astype("float32")
        return (before + news * (coefficients[i, j // size] + one)).astype(predicted.dtype)

    return te.compute(predicted.shape, number, name="corrected")
