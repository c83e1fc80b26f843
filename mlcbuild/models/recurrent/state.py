"""The state of a recurrent model, held by TVM's `RNNState`: a few vectors per layer and sequence, in float32.

A runtime names the sequences of a call with `vm.builtin.kv_state_begin_forward`, and the library reads and writes the
states of just these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import relax

from mlcbuild.models.operations import Expr


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
