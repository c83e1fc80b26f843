"""Embeddings for each layer, and layers that read the keys and values of an earlier one (Gemma 3n and 4).

    embeddings   `embed` gives a token's row of a second table beside that of the first: [n, H + layers * P]. The first
                 layer's input makes as many numbers, and each layer is given its P of both, added
    keys         a layer that keeps none (Structure.keys_from) is given what the other's matrices made of its input, and
                 that layer's norm of keys: it norms and turns them once more, and the KV cache stores the same numbers
                 at the same places

Source of the arithmetic: transformers modeling_gemma4.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tvm import relax, te, tirx

from mlcbuild.models.decoder import Decoder
from mlcbuild.models.operations import Expr
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Declared, Given, Weights

_DIGITS = 3


def width(s: Structure) -> int:
    """What `embed` gives for each token: with n-grams, the token itself, too, in numbers below 256."""
    return s.hidden_size + s.num_hidden_layers * s.per_layer_size + (_DIGITS if s.ngrams else 0)


def embedded(d: Decoder, ids: Expr, weights: Weights) -> Expr:
    """ids int32 [n] -> [n, width] in the model dtype."""
    s = d.structure
    rows = d.operations.embedding(ids, weights("embedding"), s.hidden_size)
    if s.ngrams:
        digits = d.builder.emit_te(_digits, ids, d.dtype, primfunc_name_hint="digits")
        return d.builder.emit(relax.op.concat([rows, digits], axis=1))
    if not s.per_layer_size:
        return rows
    known = d.builder.emit_te(_known, ids, s.per_layer_rows, primfunc_name_hint="known_ids")
    more = d.operations.embedding(known, weights("per_layer_embedding"), s.num_hidden_layers * s.per_layer_size)
    return d.builder.emit(relax.op.concat([rows, more], axis=1))


def _digits(ids: te.Tensor, dtype: str) -> te.Tensor:
    """[n, 3], the lowest first: every model dtype has these numbers."""
    shape = ids.shape[0], _DIGITS
    return te.compute(shape, lambda i, k: ((ids[i] >> (k.astype("int32") * 8)) & 255).astype(dtype), name="digits")


def tokens(d: Decoder, x: Expr) -> tuple[Expr, Expr | None]:
    """What `embed` gave [n, width] -> embeddings, and the tokens as float32 [n, 1], which has them all."""
    if not d.structure.ngrams:
        return x, None
    both = d.builder.emit(relax.op.split(x, [d.structure.hidden_size], axis=1))
    first, digits = (d.builder.emit(relax.TupleGetItem(both, i)) for i in (0, 1))
    return first, d.builder.emit_te(_tokens, digits, primfunc_name_hint="tokens")


def _tokens(digits: te.Tensor) -> te.Tensor:
    shape = digits.shape[0], 1
    return te.compute(shape, lambda i, k: digits[i, 0] + 256 * digits[i, 1] + 65536 * digits[i, 2], name="tokens")


def _known(ids: te.Tensor, rows: int) -> te.Tensor:
    """Tokens of images and sounds, which come behind the table's, are as the first."""
    return te.compute(ids.shape, lambda i: tirx.if_then_else(ids[i] < rows, ids[i], 0), name="known_ids")


def apart(d: Decoder, x: Expr) -> tuple[Expr, Expr | None]:
    """[n, width] -> the first table's rows [n, H], the second's [n, layers * P]."""
    if not d.structure.per_layer_size:
        return x, None
    both = d.builder.emit(relax.op.split(x, [d.structure.hidden_size], axis=1))
    first, second = (d.builder.emit(relax.TupleGetItem(both, i)) for i in (0, 1))
    return first, second


def inputs(d: Decoder, x: Expr, rows: Expr, weights: Weights) -> list[Expr]:
    """What the first layer is given x [n, H] and rows [n, layers * P] -> for each layer [n, P]."""
    s, emit = d.structure, d.builder.emit
    size, layers, n = s.per_layer_size, s.num_hidden_layers, x.ty.shape[0]
    made = d.scaled(d.project(x, weights, "per_layer"), s.hidden_size**-0.5)
    made = d.norm(emit(relax.op.reshape(made, [n * layers, size])), weights, "per_layer_norm")
    made = emit(relax.op.reshape(made, [n, layers * size]))
    made = d.scaled(emit(relax.op.add(made, d.scaled(rows, size**0.5))), 2**-0.5)
    parts = emit(relax.op.split(made, layers, axis=1))
    return [emit(relax.TupleGetItem(parts, layer)) for layer in range(layers)]


def added(d: Decoder, x: Expr, given: Expr, weight: Given) -> Expr:
    """x [n, H] and what the layer is given [n, P] -> [n, H]."""
    return d.builder.emit(relax.op.add(x, made(d, x, given, weight)))


def made(d: Decoder, x: Expr, given: Expr, weight: Given) -> Expr:
    """What is added of both."""
    gate = d.operations.activation(d.project(x, weight, "per_layer_gate"), d.structure.activation)
    out = d.project(d.builder.emit(relax.op.multiply(gate, given)), weight, "per_layer_out")
    return d.norm(out, weight, "per_layer_post_norm")


def variables(d: Decoder, number: int, n: Expr) -> list[relax.Var]:
    """What a layer's function is given besides: its P [n, P]; another's keys and values [n, ...], and their norm."""
    s = d.structure
    found = [d.tensor("per_layer", [n, s.per_layer_size], d.operations.compute)] if s.per_layer_size else []
    if s.borrows(number):
        norm = _norm(d, number)
        found += [d.tensor("keys_values", [n, sum(_widths(s, number))]), d.tensor("norm", norm.shape, norm.dtype)]
    return found


def borrowed(d: Decoder, number: int, given: tuple[Expr, Expr], weight: Given) -> tuple[list[Expr], Given]:
    """Keys and values of another layer, apart, and the layer's weights with that one's norm of keys; `given` both."""
    parts, norm = given
    both = d.builder.emit(relax.op.split(parts, [_widths(d.structure, number)[0]], axis=1))
    pair = [d.builder.emit(relax.TupleGetItem(both, i)) for i in (0, 1)]
    return pair, weight.also(_norm(d, number), norm)


def norm_of(d: Decoder, number: int, params: Sequence[Expr]) -> Expr:
    """Of a layer's parameters in order, its norm of keys."""
    mine = [p for p in d.declared if p.layer == number]
    return params[next(at for at, p in enumerate(mine) if p.role == "k_norm")]


def _source(d: Decoder, number: int) -> int:
    keys_from = d.structure.keys_from
    assert keys_from is not None
    return keys_from[number]


def _norm(d: Decoder, number: int) -> Declared:
    found = next(p for p in d.declared if p.layer == _source(d, number) and p.role == "k_norm")
    return replace(found, layer=number)


def _widths(s: Structure, number: int) -> tuple[int, int]:
    own = s.at(number)
    key, value = (dim or own.head_dim for dim in (own.qk_head_dim, own.value_head_dim))
    return own.num_key_value_heads * key, own.num_key_value_heads * value
