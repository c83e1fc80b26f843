"""`create_rnn_state`: TVM's `RNNState`, which holds what a recurrent model carries from token to token.

CONTRACT: `create_rnn_state(max_batch_size, max_history)`, each argument a shape of one element. A state is read from
the slot of this step and written to the next one, so that the last `max_history - 1` steps can be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.script import tirx as T

from mlcbuild.models.recurrent.operations import Slot


def emit_create(builder: relax.BlockBuilder, layers: int, slots: Sequence[Slot]) -> None:
    """Add `create_rnn_state`; `slots` are what each layer keeps."""
    sizes = [tirx.Var(name, "int64") for name in ("max_batch_size", "max_history")]
    params = [relax.Var(f"{size.name}_", relax.ShapeType([size])) for size in sizes]
    getters = [builder.add_func(_getter(slot.size), f"rnn_state_get_{i}") for i, slot in enumerate(slots)]
    setters = [builder.add_func(_setter(slot.size), f"rnn_state_set_{i}") for i, slot in enumerate(slots)]
    with builder.function("create_rnn_state", params):
        state = relax.call_pure_packed(
            "vm.builtin.rnn_state_create",
            relax.prim_value(layers),
            relax.prim_value(sizes[0]),
            relax.prim_value(sizes[1]),
            relax.Tuple(getters),
            relax.Tuple(setters),
            relax.Tuple([relax.const(np.full((slot.size,), slot.first, np.float32)) for slot in slots]),
            ty_args=relax.AnyType(),
        )
        builder.emit_func_output(builder.emit(state))


def _getter(size: int) -> Any:
    @T.prim_func(s_tir=True, private=True)
    def rnn_state_get(var_storage: T.handle, var_sequence: T.handle, var_history: T.handle, var_out: T.handle):
        T.func_attr({"tirx.noalias": True})
        sequences = T.int64()
        history = T.int64()
        batch = T.int64()
        storage = T.match_buffer(var_storage, (sequences, history, size), "float32")
        sequence_slot = T.match_buffer(var_sequence, (batch,), "int32")
        history_slot = T.match_buffer(var_history, (batch,), "int32")
        out = T.match_buffer(var_out, (batch, size), "float32")
        for i, j in T.grid(batch, size):
            with T.sblock("get"):
                vi, vj = T.axis.remap("SS", [i, j])
                out[vi, vj] = storage[sequence_slot[vi], history_slot[vi], vj]

    return rnn_state_get


def _setter(size: int) -> Any:
    @T.prim_func(s_tir=True, private=True)
    def rnn_state_set(var_storage: T.handle, var_sequence: T.handle, var_history: T.handle, var_data: T.handle):
        T.func_attr({"tirx.noalias": True})
        sequences = T.int64()
        history = T.int64()
        batch = T.int64()
        storage = T.match_buffer(var_storage, (sequences, history, size), "float32")
        sequence_slot = T.match_buffer(var_sequence, (batch,), "int32")
        history_slot = T.match_buffer(var_history, (batch,), "int32")
        data = T.match_buffer(var_data, (batch, size), "float32")
        for i, j in T.grid(batch, size):
            with T.sblock("set"):
                vi, vj = T.axis.remap("SS", [i, j])
                storage[sequence_slot[vi], (history_slot[vi] + 1) % T.cast(history, "int32"), vj] = data[vi, vj]

    return rnn_state_set
