"""The encoder (BERT, Devlin et al., arXiv 1810.04805): every token sees every other, and there is no state.

One public function, MLC's: `prefill(inputs int32 [b, s], attention_mask int32 [b, s], params) -> [b, s, H]`. Tokens
whose mask is 0 are seen by nobody; what comes out in their places means nothing. Private functions work on [n, H],
n = b * s. Of newer ones (ModernBERT, Warner et al., arXiv 2412.13663) positions are rotary, MLPs gated, norms before
attention and MLP, and some layers see a window to both sides: a bias of scores by distance that leaves nothing outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from tvm import relax, te, tirx

from mlcbuild.models.decoder import Decoder, numbered, one_per_kind
from mlcbuild.models.layer import mlp
from mlcbuild.models.operations import Expr
from mlcbuild.models.rope import inverse_frequencies, rotary
from mlcbuild.models.weights import Given, Weights

# attend(qkv [n, 3 * heads * D] of the model dtype, mask int32 [b, s], bias float32 [heads, 2 * C - 1] or None, heads)
# -> [n, heads * D] of that dtype: softmax(q kᵀ / sqrt(D) + bias) v of each head, among the tokens of its sequence whose
# mask is not 0. Entry j - i + C - 1 of a head's bias is for the query i and the key j. As relax operations:
# reshape to [b, s, 3, heads, D], split, permute, matmul, where(mask), softmax, matmul.
_UNSEEN = -1e30  # what a score is lowered by where a window ends
Attend = Callable[[Expr, Expr, Expr | None, int], Expr]


def emit_encoder(decoder: Decoder, attend: Attend) -> None:
    """Add the public function of an encoder to its builder."""
    d, hidden_size = decoder, decoder.structure.hidden_size
    run = _emit_model(d, one_per_kind(d, lambda number: _emit_layer(d, attend, number)))
    b, s = tirx.Var("batch_size", "int64"), tirx.Var("seq_len", "int64")
    ids, mask = d.tensor("inputs", [b, s], "int32"), d.tensor("attention_mask", [b, s], "int32")
    params = d.params()

    def body() -> Expr:
        weights = d.weights(params)
        flat = d.builder.emit(relax.op.reshape(ids, [b * s]))
        hidden = d.builder.emit(relax.Call(run, [_embedded(d, weights, flat, ids), mask, *biases(d, weights), params]))
        return relax.op.reshape(d.cast(hidden, d.dtype), [b, s, hidden_size])

    d.function("prefill", [ids, mask, params], body)


def _embedded(d: Decoder, weight: Weights, flat: Expr, ids: Expr) -> Expr:
    """Token, position and the first type's embedding, added: [n, E]. `flat` has the ids of all sequences."""

    def positions() -> Expr:
        return d.builder.emit_te(_positions, ids, flat.ty.shape[0], primfunc_name_hint="positions")

    return summed(d, looked_up(d, flat, weight), positions, weight)


def looked_up(d: Decoder, ids: Expr, weight: Given | Weights, role: str = "embedding") -> Expr:
    """Rows of a table, in the compute dtype: ids int32 [n] -> [n, E]."""
    return d.cast(d.operations.embedding(ids, weight(role), _width(d)), d.operations.compute)


def summed(d: Decoder, x: Expr, positions: Callable[[], Expr], weight: Given | Weights) -> Expr:
    """Embeddings of tokens [n, E] and those of their positions, int32 [n], and of the first type, where there are."""
    if "position_embedding" in weight:
        x = relax.op.add(x, looked_up(d, d.rows(positions()), weight, "position_embedding"))
    if "token_type_embedding" in weight:
        first = d.builder.emit_te(
            lambda: te.compute((1,), lambda _: tirx.const(0, "int32")), primfunc_name_hint="first"
        )
        x = relax.op.add(_emitted(d, x), looked_up(d, first, weight, "token_type_embedding"))
    return _emitted(d, x)


def started(d: Decoder, x: Expr, weight: Given | Weights) -> Expr:
    """What the first layer is given for a sum of embeddings: [n, E] -> [n, H].

    Narrow tables (ELECTRA's, Clark et al., arXiv 2003.10555) are followed by a matrix.
    """
    x = d.norm(x, weight, "embedding_norm") if "embedding_norm" in weight else x
    return d.project(x, weight, "embedding") if "embedding_proj" in weight else x


def _emitted(d: Decoder, x: Expr) -> Expr:
    return x if isinstance(x, relax.Var) else d.builder.emit(x)


def _width(d: Decoder) -> int:
    """E, of the tables' rows."""
    return d.structure.embedding_size or d.structure.hidden_size


def biases(d: Decoder, weight: Given | Weights) -> list[Expr]:
    """MPNet's biases of scores by distance, the same for all layers, or a window's: float32 [heads, 2 * C - 1]."""
    s, longest = d.structure, d.structure.context_window_size
    if s.sliding_window_size is not None:
        shape, window = (s.num_attention_heads, 2 * longest - 1), s.sliding_window_size

        def of_distance(_: Expr, j: Expr) -> Expr:
            seen = tirx.abs(j - (longest - 1)) < window
            return tirx.if_then_else(seen, tirx.const(0, "float32"), tirx.const(_UNSEEN, "float32"))

        return [d.builder.emit_te(lambda: te.compute(shape, of_distance, name="window"), primfunc_name_hint="window")]
    if "relative_bias" not in weight:
        return []
    rows = relax.const(buckets(d.structure.context_window_size))

    def table(of: te.Tensor, w: te.Tensor) -> te.Tensor:
        return te.compute((w.shape[1], of.shape[0]), lambda h, j: w[of[j], h].astype("float32"), name="biases")

    return [d.builder.emit_te(table, rows, weight("relative_bias").plain, primfunc_name_hint="biases")]


def buckets(longest: int) -> npt.NDArray[np.int32]:
    """int32 [2 * C - 1]: the row of 32 for each distance of a key from the query, as T5 has them (arXiv 1910.10683).

    Half of them are for keys behind the query; up to 8 each distance has its own, and those from 128 on share one.
    """
    distance = np.arange(1 - longest, longest)
    far = np.maximum(np.abs(distance), 1).astype(np.float32)
    large = 8 + (np.log(far / np.float32(8)) / np.float32(math.log(16)) * 8).astype(np.int32)
    rows = np.where(np.abs(distance) < 8, np.abs(distance), np.minimum(large, 15))
    found: npt.NDArray[np.int32] = (rows + 16 * (distance > 0)).astype(np.int32)
    return found


def _positions(ids: te.Tensor, n: Expr) -> te.Tensor:
    """[n], n being the number of ids as those name it who are given positions: kernels are joined by equal shapes."""
    return te.compute((n,), lambda i: (i % ids.shape[1]).astype("int32"), name="positions")


def _emit_layer(d: Decoder, attend: Attend, number: int) -> relax.GlobalVar:
    """Add `encoder_layer(x [n, H], mask [b, s], the layer's parameters...) -> [n, H]`."""
    inputs, given = layer_inputs(d, d.structure.hidden_size), d.layer_parameters(number)
    weight = d.given(number, given)
    name = numbered("encoder_layer", number)
    return d.function(name, [*inputs, *given], lambda: layer(d, attend, inputs, weight, number), private=True)


def layer(d: Decoder, attend: Attend, inputs: Sequence[Expr], weight: Given, number: int) -> Expr:
    """One layer's computation on what `layer_inputs` describes: [n, H]. `number` is a layer of the same kind."""
    x, mask, *bias = inputs
    s = d.structure
    first = s.norm_position == "pre"
    used = bias[0] if bias and (s.sliding_window_size is None or s.layer_type(number) == "sliding") else None
    normed = d.norm(x, weight, "attention_norm") if first and "attention_norm" in weight else x
    qkv = _every_head(d, _turned(d, d.project(normed, weight, "qkv", d.dtype), mask, number))
    attended = attend(qkv, mask, used, s.num_attention_heads)
    x1 = d.builder.emit(relax.op.add(x, d.project(attended, weight, "o")))
    x1 = x1 if first else d.norm(x1, weight, "attention_norm")
    normed = d.norm(x1, weight, "mlp_norm") if first else x1
    x2 = d.builder.emit(relax.op.add(x1, mlp(d, normed, x1, weight)))
    return x2 if first else d.norm(x2, weight, "mlp_norm")


def _turned(d: Decoder, qkv: Expr, mask: Expr, number: int) -> Expr:
    """Fused heads [n, (heads + 2 * kv heads) * D] with queries and keys turned, where the model does that."""
    s, shape = d.structure, list(qkv.ty.shape)
    if not s.turns(number):
        return qkv
    kind, (heads, kv_heads) = s.layer_type(number), (s.num_attention_heads, s.num_key_value_heads)
    positions = d.builder.emit_te(_positions, mask, shape[0], primfunc_name_hint="positions")
    apart = d.builder.emit(relax.op.reshape(qkv, [shape[0], heads + 2 * kv_heads, s.head_dim]))
    turned = d.operations.rope(apart, positions, inverse_frequencies(s, kind), (heads, kv_heads), rotary(s, kind))
    return d.builder.emit(relax.op.reshape(turned, shape))


def _every_head(d: Decoder, qkv: Expr) -> Expr:
    """Fused heads with as many keys and values as queries: [n, 3 * heads * D]. Neighbouring queries share theirs."""
    heads, kv_heads, dim = d.structure.num_attention_heads, d.structure.num_key_value_heads, d.structure.head_dim
    if heads == kv_heads:
        return qkv

    def spread(fused: te.Tensor) -> te.Tensor:
        def at(i: tirx.Var, j: tirx.Var) -> Expr:
            head = j // dim
            kind, number = head // heads, head % heads  # queries, keys or values
            theirs = heads + (kind - 1) * kv_heads + number // (heads // kv_heads)
            return fused[i, tirx.if_then_else(kind == 0, head, theirs) * dim + j % dim]

        return te.compute((fused.shape[0], 3 * heads * dim), at, name="every_head")

    return d.builder.emit_te(spread, qkv, primfunc_name_hint="every_head")


def _emit_model(d: Decoder, layers: Sequence[relax.GlobalVar]) -> relax.GlobalVar:
    """Add `encoder(x [n, E], mask [b, s], params) -> [n, H]`: all layers, and the norm before them."""
    x, mask, *bias = layer_inputs(d, _width(d))
    params = d.params()

    def body() -> Expr:
        weights = d.weights(params)
        hidden = started(d, x, weights)
        for number, function in enumerate(layers):
            hidden = d.builder.emit(relax.Call(function, [hidden, mask, *bias, *weights.layer(number)]))
        return d.norm(hidden, weights, "final_norm") if "final_norm" in weights else hidden

    return d.function("encoder", [x, mask, *bias, params], body, private=True)


def layer_inputs(d: Decoder, width: int) -> list[relax.Var]:
    """What a layer is given beside its parameters: x, the mask, and biases where there are."""
    x = d.tensor("x", [tirx.Var("rows", "int64"), width], d.operations.compute)
    sizes: list[Expr] = [tirx.Var(name, "int64") for name in ("batch_size", "seq_len")]
    heads, distances = d.structure.num_attention_heads, 2 * d.structure.context_window_size - 1
    biased = "relative_bias" in d.structure.roles() or d.structure.sliding_window_size is not None
    return [x, d.tensor("mask", sizes, "int32"), *([d.tensor("bias", [heads, distances], "float32")] if biased else [])]
