"""Attention of which queries and keys go through two convolutions over tokens: compressed convolutional attention.

One of each channel by itself, then one of all channels of a head; to what they give, queries and keys as they were are
added: half of each and half of its partner, of keys the mean of their queries. All are of length sqrt(head_dim) then,
times a number of its own for each key head. Half of the values' columns are of the token before (Figliolia et al.,
arXiv 2510.04476; Zaya). Source of the arithmetic: transformers modeling_zaya.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from tvm import relax, te

from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent import mixing
from mlcbuild.models.recurrent.layers import Layer
from mlcbuild.models.recurrent.operations import Slot
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Weight

_EPS = 1e-14  # lengths are divided by; transformers keeps them above float32's epsilon


def slots(s: Structure) -> tuple[Slot, ...]:
    """What each layer with such attention keeps per sequence: the last queries and keys, and its last input."""
    if not s.convolutions:
        return ()
    heads = s.num_attention_heads + s.num_key_value_heads
    return Slot((sum(s.convolutions) - 2) * heads * s.head_dim), Slot(s.hidden_size)


def heads_of(at: Layer, x: Expr, slot: int) -> list[Expr]:
    """Queries, keys and values of x [n, H], each [n, heads * D] in the model dtype; `slot` is the first of `slots`."""
    d, s, emit, weight = at.decoder, at.decoder.structure, at.decoder.builder.emit, at.weight
    n, dim, queries = x.ty.shape[0], s.head_dim, s.num_attention_heads
    heads, taps = queries + s.num_key_value_heads, s.convolutions[1]
    given = emit(relax.op.concat([d.project(x, weight, "q"), d.project(x, weight, "k")], axis=1))
    before = at.state.read(slot)
    convolution = at.plain("qk_convolution"), at.plain("qk_convolution_bias")
    rows = at.te(partial(_by_channel, dim, taps), given, before, *convolution)
    at.state.write(slot, at.te(mixing.last_kept, given, before))
    # A head's matrix is chosen as an expert's is: [heads, D, D * taps], as it lies in the checkpoint.
    every = relax.const(np.arange(heads, dtype=np.int32)[None])
    chosen = emit(relax.op.broadcast_to(every, relax.ShapeExpr([n, heads])))
    matrices = Weight({"weight": emit(relax.op.reshape(at.plain("qk_mixing"), [heads, dim, dim * taps]))}, None, dim)
    mixed = emit(relax.op.reshape(d.operations.expert_linear(rows, chosen, matrices), [n, heads * dim]))
    added = at.te(partial(_added, queries, dim), mixed, given, at.plain("qk_mixing_bias"))
    normed = d.operations.rms_norm(emit(relax.op.reshape(added, [n * heads, dim])), d.ones(dim), _EPS)
    both = emit(relax.op.split(emit(relax.op.reshape(normed, [n, heads * dim])), [queries * dim], axis=1))
    q, k = (emit(relax.TupleGetItem(both, i)) for i in (0, 1))
    delayed = at.te(mixing.before, x, at.shifted(x, slot + 1))
    v = emit(relax.op.concat([d.project(x, weight, "v"), d.project(delayed, weight, "v_before")], axis=1))
    return [d.cast(each, d.dtype) for each in (q, at.te(_by_head, k, at.plain("key_scale")), v)]


def _by_channel(dim: int, taps: int, x: te.Tensor, kept: te.Tensor, w: te.Tensor, bias: te.Tensor) -> te.Tensor:
    """Each channel of x [n, C] convolved with w [C, 1, K]: [n * C / dim, dim * taps], channels of a head with their
    results at this token and the `taps` - 1 before it, the oldest first."""
    heads, own = int(x.shape[1]) // dim, int(w.shape[2])

    def value(p: Any, q: Any) -> Any:
        c, back = p % heads * dim + q // taps, taps - 1 - q % taps
        terms = [w[c, 0, j] * mixing.earlier(x, kept, p // heads, c, back + own - 1 - j) for j in range(own)]
        return sum(terms, bias[c])

    return te.compute((x.shape[0] * heads, dim * taps), value, name="by_channel")


def _added(queries: int, dim: int, mixed: te.Tensor, given: te.Tensor, bias: te.Tensor) -> te.Tensor:
    keys = int(given.shape[1]) // dim - queries
    group = queries // keys

    def value(i: Any, j: Any) -> Any:
        head = j // dim
        key = te.if_then_else(head < queries, head // group, head - queries)
        mean = sum(given[i, (key * group + h) * dim + j % dim] for h in range(group)) / group
        one = te.if_then_else(head < queries, given[i, j], mean)
        return mixed[i, j] + bias[j].astype("float32") + (one + given[i, (queries + key) * dim + j % dim]) / 2

    return te.compute(given.shape, value, name="added")


def _by_head(x: te.Tensor, scale: te.Tensor) -> te.Tensor:
    """x [n, heads * D], each head times its number of [heads]."""
    dim = x.shape[1] // scale.shape[0]
    return te.compute(x.shape, lambda i, j: x[i, j] * scale[j // dim].astype("float32"), name="by_head")
