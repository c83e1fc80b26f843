"""What recurrent models need of a device beyond a decoder's operations (mlcbuild.models.operations).

`n` tokens are those of `b` sequences of equal length, one sequence after the other; t = n / b. Activations and states
are float32, whatever the model dtype: what is carried from token to token for thousands of steps must not be rounded.
The state is held by TVM's `RNNState`: a few vectors per layer and sequence. A runtime names the sequences of a call
with `vm.builtin.kv_state_begin_forward`, and the library reads and writes the states of just these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import relax

from mlcbuild.models.operations import Expr

MLSTM_EPS = 1e-6  # transformers' `eps`, which recipes/architectures/xlstm.yaml asks for


@dataclass(frozen=True)
class Scanned:
    """A selective scan: `heads` of `dim` channels, each with a state of `size` values; a step is kept within `limits`.

    `groups` of neighbouring heads share what goes into a state and what is read from it. `each`: a head is a channel,
    whose state has a rate for each of its values, not one for all.
    """

    heads: int
    dim: int
    groups: int
    size: int
    limits: tuple[float, float]
    each: bool


@dataclass(frozen=True)
class Recurrence:
    """Builders of relax expressions.

    wkv4(key, value [n, A], decay, bonus [A], (a, b, m) each [b, A]) -> (out [n, A], a, b, m)
        For each channel, over the tokens of a sequence in order, with decay <= 0 a logarithm:
        out = (a e^m + v e^(bonus + k)) / (b e^m + e^(bonus + k)); then a e^m becomes a e^(m + decay) + v e^k and
        b e^m becomes b e^(m + decay) + e^k, where m is the larger exponent, so that nothing overflows.
    wkv(receptance, key, value [n, heads * D], decay [1 or n, heads * D], bonus [heads * D],
        state [b, heads * D * D], heads) -> (out [n, heads * D], state)
        For each head, over the tokens in order, with S its [D, D] state: out_i = sum_j r_j (S_ij + bonus_j k_j v_i);
        then S_ij becomes decay_j S_ij + k_j v_i.
    project(x [n, G * K], w [G, K, N]) -> [G, n, N]
        G products of narrow matrices: reshape x to [n, G, K], permute to [G, n, K], matmul.
    convolve(x [n, C], w [C, 1, K], bias [C] or None, state [b, (K - 1) * C], activated) -> (out [n, C], state)
        silu (where `activated`) of the sum over the K last inputs x_t of a channel, each times its weight, and the
        bias. The state holds the last K - 1 inputs, [K - 1, C], the oldest first.
    scan(x [n, heads * dim], step [n, heads], step_bias [heads], rate [heads] or [size, heads], b, c [n, groups * size],
        skip [heads], state [b, size * heads * dim], scanned) -> (out [n, heads * dim], state)
        For each channel, over the tokens in order, with s its state and t = softplus(step + step_bias) within limits:
        s becomes exp(t rate) s + t x b; then out = s . c + skip x.
    delta(x [n, 2 * groups * size + heads * dim], decay [n, heads * each], beta [n, heads],
        state [b, heads * size * dim], scanned) -> (out [n, heads * dim], state)
        The gated delta rule for each head, with queries, keys and values next to each other in x, and S its
        [size, dim] state: S becomes decay S, then S + k (beta (v - S^T k))^T; then out = S^T q / sqrt(size), where q
        and k are of length 1. `each`: a decay for each of the `size` rows of S, else one for all.
    mlstm(x [n, 2 * heads * size + heads * dim], gates [n, 2 * heads], memory [b, heads * size * (dim + 1)],
        top [b, heads], scanned) -> (out [n, heads * (dim + 1)], memory, top)
        For each head, with queries, keys and values next to each other in x, a last number of v that is 1, logarithms w
        and f of its gates of writing and keeping, and M its [size, dim + 1] memory, which is kept times exp(-top): top
        becomes max(f + top, w), M exp(f + top before - top) M + exp(w - top) k v^T; then out = M^T q / sqrt(size), its
        last number max(|that|, exp(-top)) + MLSTM_EPS, which the others are to be divided by.
    lru_gates(x [n, heads * K], w [heads, K, K], bias [heads * K]) -> [n, heads * K]
        For each head: sigmoid(x w + bias).
    lru(x [n, W], decay [n, W], state [b, W]) -> (out [n, W], state)
        For each channel, over the tokens in order: s becomes decay s + x; then out = s.
    """

    wkv4: Callable[..., tuple[Expr, Expr, Expr, Expr]]
    wkv: Callable[..., tuple[Expr, Expr]]
    project: Callable[[Expr, Expr], Expr]
    convolve: Callable[[Expr, Expr, Expr | None, Expr, bool], tuple[Expr, Expr]]
    scan: Callable[..., tuple[Expr, Expr]]
    delta: Callable[..., tuple[Expr, Expr]]
    mlstm: Callable[..., tuple[Expr, Expr, Expr]]
    lru_gates: Callable[[Expr, Expr, Expr], Expr]
    lru: Callable[[Expr, Expr, Expr], tuple[Expr, Expr]]


@dataclass(frozen=True)
class Slot:
    """One vector that a layer keeps per sequence: `size` float32 values that all begin as `first`."""

    size: int
    first: float = 0.0


class State:
    """The states of one layer inside a function of the module, for `batch` sequences.

    `write` gives a new expression for the whole state: a function that writes returns `expression`, or the write is
    dead code.
    """

    def __init__(
        self, builder: relax.BlockBuilder, expression: Expr, layer_id: Expr, batch: Expr, slots: Sequence[Slot]
    ) -> None:
        self.expression = expression
        self.batch = batch
        self._builder, self._layer_id, self._slots = builder, layer_id, slots

    def read(self, slot: int) -> Expr:
        """float32 [batch, size]"""
        return self._builder.emit(
            relax.call_dps_packed(
                "vm.builtin.rnn_state_get",
                [self.expression, self._layer_id, relax.prim_value(slot)],
                out_ty=relax.TensorType([self.batch, self._slots[slot].size], "float32"),
            )
        )

    def write(self, slot: int, value: Expr) -> None:
        """value: float32 [batch, size]"""
        self.expression = self._builder.emit(
            relax.call_pure_packed(
                "vm.builtin.rnn_state_set",
                self.expression,
                self._layer_id,
                relax.prim_value(slot),
                value,
                ty_args=relax.AnyType(),
            )
        )
