"""An encoder in pieces: one layer at a time, its weights given with each call, as layer_pieces.py has a decoder.

A text is one sequence, whole in every call: all of its tokens see each other. Rows are in the compute dtype.

    embed(input_ids int32 [n], embedding...) -> [n, E]
    beginning(x [n, E], positions int32 [n], the other tables', their norm's and matrix's...) -> [n, H]
    encoder_layer(x [n, H], mask int32 [1, n], the layer's...) -> [n, H]
    encoder_layer_inputs(the same) -> ([n, H], what each matrix of the layer is multiplied with: [n, K], in order)
    encoder_layer_1, encoder_layer_inputs_1, ...: the same for layers of other kinds (Structure.layer_kinds)
"""

from __future__ import annotations

from tvm import tirx

from mlcbuild.models.decoder import Decoder
from mlcbuild.models.encoder import Attend, biases, layer, layer_inputs, looked_up, started, summed
from mlcbuild.models.layer_pieces import emit_piece, emit_watched
from mlcbuild.models.operations import Expr
from mlcbuild.models.parameters import BEGINNING, EMBED
from mlcbuild.models.weights import Given


def emit_encoder_pieces(decoder: Decoder, attend: Attend) -> None:
    """Add every piece of an encoder that has one layer of each kind to its builder. Not for biases by distance."""
    d = decoder
    ids = d.tensor("input_ids", [tirx.Var("seq_len", "int64")], "int32")
    emit_piece(d, "embed", [ids], EMBED, lambda w: looked_up(d, ids, w))
    n = tirx.Var("seq_len", "int64")
    x = d.tensor("x", [n, d.structure.embedding_size or d.structure.hidden_size], d.operations.compute)
    positions = d.tensor("positions", [n], "int32")
    emit_piece(d, "beginning", [x, positions], BEGINNING, lambda w: started(d, summed(d, x, lambda: positions, w), w))
    for kind in range(d.structure.num_hidden_layers):
        for with_inputs in (False, True):
            _emit_layer(d, attend, kind, with_inputs)


def _emit_layer(d: Decoder, attend: Attend, kind: int, with_inputs: bool) -> None:
    x, mask, *_ = layer_inputs(d, d.structure.hidden_size)
    given = d.layer_parameters(kind)

    def body(watching: Decoder) -> Expr:
        windows = biases(d, Given([], []))
        return layer(watching, attend, [x, mask, *windows], d.given(kind, given), kind)

    emit_watched(d, "encoder_layer", kind, [x, mask, *given], body, with_inputs)
