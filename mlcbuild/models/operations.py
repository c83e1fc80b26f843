"""The operations that a decoder is built from; each device gives its own (compiler.cpu.operations ...).

Tensors are relax expressions. `n` is a number of tokens: all sequences of a batch, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlcbuild.models.rope import Frequencies, Rotary
from mlcbuild.models.weights import Weight

Expr = Any  # a relax expression


@dataclass(frozen=True)
class Operations:
    """Builders of relax expressions.

    compute: the dtype of activations between operations; embeddings, hidden states that leave the library, and the KV
    cache are of the model dtype
    linear(x [n, K], weight [N, K], out_dtype) -> [n, N]
    embedding(ids int32 [n], weight [V, H], H) -> [n, H]
    rms_norm(x [n, H], weight [H], eps) -> [n, H]
    layer_norm(x [n, H], weight [H] or None, bias [H] or None, eps) -> [n, H]
    gated(x [n, 2 * I], activation name) -> [n, I]: activation of the first half, times the second
    activation(x [n, I], activation name) -> [n, I]
    choose_experts(logits float32 [n, E], count, normalised, scale) -> chosen int32 [n, count], share float32
        [n, count]: the `count` largest of softmax(logits), the first of equal ones; their probabilities, `normalised`
        to a sum of 1, times `scale`
    expert_linear(x [n, K] or [n * count, K], chosen [n, count], weight [E, N, K]) -> [n * count, N]: each token's row,
        or its row for each choice, times the matrices of the experts that it chose
    weighted_sum(x [n * count, H], share [n, count]) -> [n, H]: each token's rows times their shares, added
    norm_heads(qkv [n, heads + 2 * kv_heads, D], (weight of queries, of keys, bias of queries or None, of keys or None),
        (heads, kv_heads), spans, norm, eps) -> the same with queries and keys normed. spans: head (each by a weight
        [D]), per_head (each by its own, [heads, D]), all (all of them as one vector, by [heads * D]); norm: rms or
        layer; a bias has its weight's shape
    rope(qkv, positions int32 [n], frequencies [rotary.dim / 2], (heads, kv_heads), rotary) -> the same with queries and
    keys turned by their positions. Needed only where layers differ in it: the KV cache turns them otherwise
    softmax(logits float32 [b, V], temperature float32 [b]) -> [b, V]
    """

    compute: str
    linear: Callable[[Expr, Weight, str], Expr]
    embedding: Callable[[Expr, Weight, int], Expr]
    rms_norm: Callable[[Expr, Expr, float], Expr]
    layer_norm: Callable[[Expr, Expr | None, Expr | None, float], Expr]
    gated: Callable[[Expr, str], Expr]
    activation: Callable[[Expr, str], Expr]
    norm_heads: Callable[[Expr, tuple[Expr | None, ...], tuple[int, int], str, str, float], Expr]
    rope: Callable[[Expr, Expr, Frequencies, tuple[int, int], Rotary], Expr]
    softmax: Callable[[Expr, Expr], Expr]
    choose_experts: Callable[[Expr, int, bool, float], tuple[Expr, Expr]]
    expert_linear: Callable[[Expr, Expr, Weight], Expr]
    weighted_sum: Callable[[Expr, Expr], Expr]
