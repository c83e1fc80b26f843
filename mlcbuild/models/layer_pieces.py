"""A decoder in pieces: one layer at a time, its weights given with each call.

For models whose weights do not fit into memory, and for measuring what runs through a layer. The computation is the
decoder's own (mlcbuild.models.decoder); only who calls whom differs. Hidden states between the pieces are [n, H] in the
compute dtype, of hyper-connections all states of a token [n, S * H] from the beginning on. The parameters of a piece
are those of its roles, in the order of `Decoder.declared`.

    embed(input_ids int32 [n], embedding...) -> [n, H]
    beginning(x [n, H], positions int32 [n], position_embedding..., embedding_norm...) -> [n, H], where there is one
    decoder_layer(x [n, H], cache, layer_id, the layer's...) -> [n, H]
    decoder_layer_inputs(the same) -> ([n, H], and what each matrix of the layer is multiplied with: [n, K], in order;
        of experts x [n, K] or [n * choices, K], and then which experts the tokens chose: int32 [n, choices])
    decoder_layer_1, decoder_layer_inputs_1, ...: the same for layers of other kinds (Structure.layer_kinds)
    final_norm(x [n, H], final_norm...) -> [n, H]
    head(normed [n, H], lm_head..., or the tied embedding..., lm_head_bias, lm_head_scale) -> float32 [n, V]

`head` takes any number of rows of its matrix and bias, so that a large vocabulary can come in slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tvm import relax, tirx

from mlcbuild.models import hyper
from mlcbuild.models.decoder import Decoder, numbered
from mlcbuild.models.layer import layer, layer_inputs
from mlcbuild.models.operations import Expr
from mlcbuild.models.parameters import BEGINNING, EMBED, FINAL_NORM
from mlcbuild.models.weights import Given, Weight, head_role


def emit_layer_pieces(decoder: Decoder) -> None:
    """Add every piece of a decoder that has one layer of each kind to its builder."""
    d, width, several = decoder, decoder.structure.hidden_size, decoder.structure.hyper
    compute = d.operations.compute

    def rows(name: str, states: int = 1) -> relax.Var:  # a variable belongs to one function
        return d.tensor(name, [tirx.Var("seq_len", "int64"), states * width], compute)

    def begun(x: Expr, positions: Expr, weights: Given) -> Expr:
        x = d.beginning(x, lambda: positions, weights)
        return hyper.started(d, x) if several else x

    ids = d.tensor("input_ids", [tirx.Var("seq_len", "int64")], "int32")
    emit_piece(d, "embed", [ids], EMBED, lambda w: d.cast(d.operations.embedding(ids, w("embedding"), width), compute))
    if d.has_beginning or several:
        first = rows("x")
        positions = d.tensor("positions", [first.ty.shape[0]], "int32")
        emit_piece(d, "beginning", [first, positions], BEGINNING, lambda w: begun(first, positions, w))
    last, normed = rows("x", d.structure.streams if several else 1), rows("normed")
    emit_piece(
        d, "final_norm", [last], FINAL_NORM, lambda w: d.finished(hyper.ended(d, last, w) if several else last, w)
    )
    of_head = head_role(d.structure), "lm_head_bias", "lm_head_scale"
    emit_piece(d, "head", [normed], of_head, lambda w: d.logits(normed, w))
    for kind in range(d.structure.num_hidden_layers):
        _emit_layer(d, kind, with_inputs=False)
        _emit_layer(d, kind, with_inputs=True)


def emit_piece(
    d: Decoder, name: str, inputs: list[relax.Var], roles: Sequence[str], body: Callable[[Given], Expr]
) -> None:
    """Add a function of `inputs` and of the parameters that have these roles."""
    declared = [p for p in d.declared if p.role in roles]
    rows = tirx.Var("vocab_size", "int64")
    given = [d.tensor(p.name, p.shape_for(rows), p.dtype) for p in declared]
    d.function(name, [*inputs, *given], lambda: body(Given(declared, given)))


def _emit_layer(d: Decoder, kind: int, with_inputs: bool) -> None:
    inputs = layer_inputs(d, kind)
    emit_watched(d, "decoder_layer", kind, inputs, lambda watched: layer(watched, *inputs, number=kind), with_inputs)


def emit_watched(
    d: Decoder, name: str, kind: int, inputs: list[relax.Var], body: Callable[[Decoder], Expr], with_inputs: bool
) -> None:
    """Add a layer's function; `with_inputs`, called `name`_inputs, it also gives what its matrices are multiplied with.

    `body` emits the layer with the decoder that it is given, which watches that.
    """
    seen: dict[str, list[Expr]] = {}  # what is multiplied with a matrix, by the name of the matrix's first part
    compute, linear, expert_linear = d.operations.compute, d.operations.linear, d.operations.expert_linear

    def first_part(weight: Weight) -> str:
        part: str = next(iter(weight.parts.values())).name
        return part

    def watched(x: Expr, weight: Weight, out_dtype: str) -> Expr:
        seen[first_part(weight)] = [d.cast(x, compute)]
        return linear(x, weight, out_dtype)

    def watched_experts(x: Expr, chosen: Expr, weight: Weight) -> Expr:
        seen[first_part(weight)] = [d.cast(x, compute), chosen]
        return expert_linear(x, chosen, weight)

    operations = replace(d.operations, linear=watched, expert_linear=watched_experts)
    watching = Decoder(d.builder, d.structure, d.declared, operations, d.dtype)

    def whole() -> Expr:
        out = d.builder.emit(body(watching))
        xs = [x for p in d.declared for x in seen.get(p.name, ())]
        return relax.Tuple([out, *xs]) if with_inputs else out

    d.function(numbered(f"{name}_inputs" if with_inputs else name, kind), inputs, whole)
