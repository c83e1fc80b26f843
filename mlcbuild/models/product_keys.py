"""Experts of one row that are found by product keys (Lample et al., arXiv 1907.05242; He, arXiv 2407.04153; Doge's).

A router makes two lists of k logits, and expert i * k + j has the sum of the i-th of one and the j-th of the other. The
c experts with the largest are of the c best of both lists; of the a-th and the b-th best, (a + 1) * (b + 1) is at most
c, as so many sums are no smaller. Each is a row that x is multiplied with, and one that is added. Source of the
arithmetic: transformers modeling_doge.py, as it decodes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax, te

from mlcbuild.models.decoder import Decoder
from mlcbuild.models.operations import Expr
from mlcbuild.models.weights import Given


def made(d: Decoder, x: Expr, weight: Given) -> Expr:
    """What the experts add for x [n, H]: [n, H]."""
    s, o, emit = d.structure, d.operations, d.builder.emit
    keys, count, n = math.isqrt(s.key_experts), s.key_experts_per_tok, x.ty.shape[0]
    best = min(count, keys)
    halves = emit(relax.op.split(o.linear(x, weight("key_router"), "float32"), 2, axis=1))
    lists = [emit(relax.TupleGetItem(halves, i)) for i in (0, 1)]
    ranked = [o.choose_experts(each, best, True, 1.0)[0] for each in lists]
    ranks = [(a, b) for a in range(best) for b in range(best) if (a + 1) * (b + 1) <= count]
    pairs = relax.const(np.array(ranks, np.int32))
    sums = d.builder.emit_te(_sums, *lists, *ranked, pairs, primfunc_name_hint="key_sums")
    places, share = o.choose_experts(sums, count, True, 1.0)
    ids = d.builder.emit_te(_numbers, places, *ranked, pairs, keys, primfunc_name_hint="key_numbers")
    first, second = (o.embedding(ids, weight(f"experts_{way}_rows"), s.hidden_size) for way in ("in", "out"))
    given = emit(relax.op.reshape(d.cast(x, "float32"), [n, 1, s.hidden_size]))
    rows = emit(relax.op.reshape(d.cast(first, "float32"), [n, count, s.hidden_size]))
    product = emit(relax.op.sum(emit(relax.op.multiply(rows, given)), axis=2))
    inner = d.cast(o.activation(d.cast(product, o.compute), s.activation), "float32")
    return o.weighted_sum(d.cast(second, o.compute), emit(relax.op.multiply(inner, share)))


def _sums(x: te.Tensor, y: te.Tensor, best_x: te.Tensor, best_y: te.Tensor, pairs: te.Tensor) -> te.Tensor:
    """[n, P]: of each pair of ranks, the sum of both logits."""

    def value(i: Any, p: Any) -> Any:
        return x[i, best_x[i, pairs[p, 0]]] + y[i, best_y[i, pairs[p, 1]]]

    return te.compute((x.shape[0], pairs.shape[0]), value, name="key_sums")


def _numbers(places: te.Tensor, best_x: te.Tensor, best_y: te.Tensor, pairs: te.Tensor, keys: int) -> te.Tensor:
    """int32 [n * count]: the experts at these places among the pairs."""
    count = int(places.shape[1])

    def value(p: Any) -> Any:
        i, at = p // count, places[p // count, p % count]
        return best_x[i, pairs[at, 0]] * keys + best_y[i, pairs[at, 1]]

    return te.compute((places.shape[0] * count,), value, name="key_numbers")
