"""Rows of a table of hashed n-grams, added to all hidden states of a token before a layer (mlcbuild.models.ngrams).

Rows make a key for each hidden state, and one value. A state takes as much of the value as its key agrees with it; what
it takes is added, and what a convolution over every `size`-th token makes of it. Source: transformers
modeling_qwen4_exp.py. Hashes have 63 bits and devices 32: a product is made in limbs of 12 bits, and its remainder by 4
bits at a time.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax, te, tirx

from mlcbuild.models.hybrid.residuals import normed
from mlcbuild.models.ngrams import NGrams, ngrams_of
from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent import mixing
from mlcbuild.models.recurrent.layers import Layer
from mlcbuild.models.recurrent.operations import Slot
from mlcbuild.models.structure import Structure

_LIMBS, _BITS = 6, 12


def slots(s: Structure) -> tuple[Slot, ...]:
    """What each layer with a state keeps per sequence: the tokens before, and the convolution's inputs."""
    if not s.ngrams:
        return ()
    g = ngrams_of(s)
    return Slot(g.size - 1, g.end), Slot((g.kernel - 1) * g.size * s.streams * s.hidden_size)


def added(at: Layer, x: Expr, tokens: Expr, table: int, slot: int) -> Expr:
    """x [n, S * H] and what the tokens float32 [n, 1] add to it; `slot` is the first of `slots`."""
    d, s, g, emit = at.decoder, at.decoder.structure, ngrams_of(at.decoder.structure), at.decoder.builder.emit
    n, before = x.ty.shape[0], at.state.read(slot)
    at.state.write(slot, at.te(mixing.last_kept, tokens, before))

    def alone(function: Any, *given: Expr) -> Expr:  # fused, a number would be computed at each of its uses
        hint = function.func.__name__.strip("_")
        return d.builder.emit_te(function, *given, primfunc_name_hint=hint, primfunc_attrs={"op_pattern": 8})

    seen = alone(partial(_seen, g), tokens, before)
    products = alone(partial(_products, g), seen, relax.const(limbs(g, table)))
    lengths = np.array(g.lengths(table), np.int32)
    starts = relax.const((np.cumsum(lengths) - lengths).astype(np.int32))
    ids = alone(partial(_rows, g), products, relax.const(lengths), starts)
    rows = d.operations.embedding(ids, at.weight("ngram_embedding"), g.width // g.parts)
    rows = d.cast(emit(relax.op.reshape(rows, [n, g.width])), "float32")
    key = normed(d, d.project(rows, at.weight, "ngram_key"), at.weight, "ngram_key_norm")
    both = emit(relax.op.multiply(key, normed(d, x, at.weight, "ngram_query_norm")))
    agreed = emit(relax.op.sum(emit(relax.op.reshape(both, [n, s.streams, s.hidden_size])), axis=2))
    taken = at.te(_taken, agreed, d.project(rows, at.weight, "ngram_value"))
    wide = at.te(partial(_spread, g.size), at.plain("ngram_convolution"))
    inner = normed(d, taken, at.weight, "ngram_value_norm")
    local, after = at.recurrence.convolve(inner, wide, None, at.state.read(slot + 1), True)
    at.state.write(slot + 1, after)
    return at.add(x, at.add(taken, local))


def limbs(g: NGrams, table: int) -> npt.NDArray[np.int32]:
    """[size * limbs]: those of each factor, the low one first."""
    found = [factor >> (_BITS * limb) & 0xFFF for factor in g.factors(table) for limb in range(_LIMBS)]
    return np.array(found, np.int32)


def _seen(g: NGrams, tokens: te.Tensor, kept: te.Tensor) -> te.Tensor:
    """int32 [n, size]: each token and those before it, from the last end of a text on; before that all are ends."""

    def value(i: Any, k: Any) -> Any:
        end = tirx.const(g.end, "int32")
        back = [mixing.earlier(tokens, kept, i, 0, j).astype("int32") for j in range(g.size)]
        found = back[-1]
        for j in range(g.size - 2, -1, -1):
            found = te.if_then_else(tirx.all(k > j, back[j] == end), end, found) if j else found
            found = te.if_then_else(k == j, back[j], found)
        return found

    return te.compute((tokens.shape[0], g.size), value, name="seen")


def _products(g: NGrams, seen: te.Tensor, factors: te.Tensor) -> te.Tensor:
    """int32 [n, size * limbs]: each token times its factor, the low limb first."""

    def value(i: Any, q: Any) -> Any:
        k, limb = q // _LIMBS, q % _LIMBS
        low, high = seen[i, k] & 0xFFF, seen[i, k] >> _BITS
        found = total = low * factors[k * _LIMBS]
        for at in range(1, _LIMBS):
            total = (total >> _BITS) + low * factors[k * _LIMBS + at] + high * factors[k * _LIMBS + at - 1]
            found = te.if_then_else(limb >= at, total, found)
        return found & 0xFFF

    return te.compute((seen.shape[0], g.size * _LIMBS), value, name="products")


def _rows(g: NGrams, products: te.Tensor, lengths: te.Tensor, starts: te.Tensor) -> te.Tensor:
    """int32 [n * parts]: the row of each part of the table."""

    def value(p: Any) -> Any:
        i, part, found = p // g.parts, p % g.parts, tirx.const(0, "int32")
        for limb in range(_LIMBS - 1, -1, -1):
            hashed = products[i, limb] ^ products[i, _LIMBS + limb]
            for k in range(2, g.size):
                other = products[i, k * _LIMBS + limb]
                hashed = hashed ^ te.if_then_else(part >= (k - 1) * g.heads, other, tirx.const(0, "int32"))
            for shift in (8, 4, 0):
                # Of a number that may be negative, a remainder would be computed several times, and each of them so.
                found = tirx.truncmod(found * 16 + ((hashed >> shift) & 15), lengths[part])
        return found + starts[part]

    return te.compute((products.shape[0] * g.parts,), value, name="rows")


def _taken(agreed: te.Tensor, values: te.Tensor) -> te.Tensor:
    size, streams = int(values.shape[1]), int(agreed.shape[1])

    def value(i: Any, j: Any) -> Any:
        gate = agreed[i, j // size] * tirx.const(1 / math.sqrt(size), "float32")
        root = te.sqrt(tirx.max(tirx.abs(gate), tirx.const(1e-6, "float32")))
        sign = te.if_then_else(gate > 0, root, te.if_then_else(gate < 0, -root, tirx.const(0, "float32")))
        return te.sigmoid(sign) * values[i, j % size]

    return te.compute((values.shape[0], size * streams), value, name="taken")


def _spread(step: int, w: te.Tensor) -> te.Tensor:
    """w [C, 1, K] with zeros between, for every `step`-th token: [C, 1, (K - 1) * step + 1]."""
    zero = tirx.const(0, "float32")
    return te.compute(
        (w.shape[0], 1, (int(w.shape[2]) - 1) * step + 1),
        lambda c, z, k: te.if_then_else(k % step == 0, w[c, z, k // step], zero),
        name="spread",
    )
