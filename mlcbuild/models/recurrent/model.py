"""The functions of a recurrent model's library: one private layer, one private model, and the entry points around it.

Private functions work on [n, H], `n` tokens of `b` sequences of equal length, and hand the state on as an object.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import ir, relax, tirx

from mlcbuild.models.decoder import Decoder, numbered, one_per_kind
from mlcbuild.models.entry_points import emit_entry_points
from mlcbuild.models.kinds import MLSTM, STATE_SPACES
from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent import layers, mlstm, state_space
from mlcbuild.models.recurrent.layers import Layer
from mlcbuild.models.recurrent.operations import Recurrence, Slot, State
from mlcbuild.models.structure import Structure

_LAYERS = {MLSTM: mlstm.layer, **dict.fromkeys(STATE_SPACES, state_space.layer)}
_SLOTS = {MLSTM: mlstm.slots, **dict.fromkeys(STATE_SPACES, state_space.slots)}


def slots(s: Structure) -> tuple[Slot, ...]:
    """What each layer keeps per sequence."""
    return _SLOTS.get(s.kind, layers.slots)(s)


def emit_recurrent(decoder: Decoder, recurrence: Recurrence) -> None:
    """Add every public function of a recurrent model to its builder, but the one that creates its state."""
    d = decoder
    run = _emit_model(d, one_per_kind(d, lambda number: _emit_layer(d, recurrence, number)))

    def forward(x: Expr, batch: Expr, state: Expr, params: Expr) -> tuple[Expr, Expr]:
        """The hidden states after x [n, H], and the state."""
        both = d.builder.emit(relax.Call(run, [x, relax.ShapeExpr([batch]), state, params]))
        return d.builder.emit(relax.TupleGetItem(both, 0)), d.builder.emit(relax.TupleGetItem(both, 1))

    emit_entry_points(d, forward, ("rnn_state",))


def _emit_layer(d: Decoder, recurrence: Recurrence, number: int) -> relax.GlobalVar:
    """Add `recurrent_layer(x [n, H], batch shape, state, layer_id, the layer's parameters...) -> ([n, H], state)`."""
    batch = tirx.Var("batch_size", "int64")
    x, state, layer_id = _hidden(d), _state(), relax.Var("layer_id", ir.PrimType("int64"))
    given = d.layer_parameters(number)
    inputs = [x, relax.Var("batch", relax.ShapeType([batch])), state, layer_id, *given]

    def body() -> Expr:
        held = State(d.builder, state, layer_id, batch, slots(d.structure))
        at = Layer(d, recurrence, held, d.given(number, given))
        hidden = _LAYERS.get(d.structure.kind, layers.layer)(at, x)
        return relax.Tuple([hidden, held.expression])

    return d.function(numbered("recurrent_layer", number), inputs, body, private=True)


def _emit_model(d: Decoder, functions: Sequence[relax.GlobalVar]) -> relax.GlobalVar:
    """Add `model(x [n, H], batch shape, state, params) -> ([n, H], state)`: all layers and the norms around them."""
    s = d.structure
    x, state, params = _hidden(d), _state(), d.params()
    shape = relax.Var("batch", relax.ShapeType([tirx.Var("batch_size", "int64")]))

    def body() -> Expr:
        weights = d.weights(params)
        hidden, after = d.norm(x, weights, "first_norm") if "first_norm" in weights else x, state
        for number, function in enumerate(functions):
            inputs = [hidden, shape, after, relax.prim_value(number), *weights.layer(number)]
            both = d.builder.emit(relax.Call(function, inputs))
            hidden, after = (d.builder.emit(relax.TupleGetItem(both, i)) for i in (0, 1))
            # Convert halves the matrices that write to the residual stream likewise, so that it stays small
            # enough for float16.
            if s.rescale_every and (number + 1) % s.rescale_every == 0:
                hidden = d.builder.emit(relax.op.multiply(hidden, relax.const(0.5, "float32")))
        return relax.Tuple([d.norm(hidden, weights, "final_norm"), after])

    return d.function("recurrent_model", [x, shape, state, params], body, private=True)


def _hidden(d: Decoder) -> relax.Var:
    return d.tensor("x", [tirx.Var("seq_len", "int64"), d.structure.hidden_size], "float32")


def _state() -> relax.Var:
    return relax.Var("rnn_state", relax.AnyType())
