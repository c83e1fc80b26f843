"""The functions that a runtime calls: embed, prefill, decode, batch_* and their hidden-state forms (docs/contract.md).

Names, argument order and shapes are MLC's. All of a decoder's run the same private `decoder`, which calls the same
private `decoder_layer` for each layer, so that what a compiler pass costs does not grow with the number of layers.
Private functions work on [n, hidden_size]: `n` tokens of all sequences of a batch, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import relax, te, tirx

from mlcbuild.models import hyper, indexer, per_layer, streams
from mlcbuild.models.decoder import Decoder, kv_cache, numbered, one_per_kind
from mlcbuild.models.layer import layer, layer_inputs, query_positions
from mlcbuild.models.operations import Expr
from mlcbuild.models.weights import Weights

# (name, batch, tokens per sequence, which rows get logits)
_FORWARD = (
    ("prefill", 1, None, "last"),
    ("decode", 1, 1, "all"),
    ("batch_prefill", 1, None, "positions"),
    ("batch_decode", None, 1, "all"),
    ("batch_verify", 1, None, "all"),
)


# (x [n, H] in the compute dtype, the number of sequences, their states, params) -> (hidden states [n, H], the states)
Run = Callable[..., tuple[Expr, ...]]


def emit_decoder(d: Decoder) -> None:
    """Add every public function of a decoder to its builder, but the one that creates its KV cache."""
    run = _emit_layers(d, one_per_kind(d, lambda number: _emit_layer(d, number)))
    # The KV cache stays the object that it was.
    emit_entry_points(d, lambda x, _, cache, params: (d.builder.emit(relax.Call(run, [x, cache, params])), cache))


def _emit_layer(d: Decoder, number: int) -> relax.GlobalVar:
    """Add `decoder_layer(layer_inputs...) -> [n, H]`."""
    inputs = layer_inputs(d, number)
    name = numbered("decoder_layer", number)
    return d.function(name, inputs, lambda: layer(d, *inputs, number=number), private=True)


def _emit_layers(d: Decoder, layers: Sequence[relax.GlobalVar]) -> relax.GlobalVar:
    """Add `decoder(x [n, width], cache, params) -> [n, H]`: all layers and the final norm, in the compute dtype."""
    s = d.structure
    x = d.tensor("x", [tirx.Var("seq_len", "int64"), per_layer.width(s)], d.operations.compute)
    cache, params = kv_cache(), d.params()
    places = {layer: place for place, layer in enumerate(s.cached)}

    def body() -> Expr:
        weights = d.weights(params)
        first, rows = per_layer.apart(d, x)
        given: Expr = d.beginning(first, lambda: query_positions(d, cache, x.ty.shape[0]), weights)
        hidden = hyper.started(d, given) if s.hyper else streams.started(d, given, weights)
        inputs = (
            [[each] for each in per_layer.inputs(d, given, rows, weights)] if rows is not None else [[]] * len(layers)
        )
        made = dict[int, tuple[Expr, Expr]]()  # of a layer that others borrow from: keys and values, their norm
        begun = dict[int, Expr]()
        chosen: list[Expr] = []  # by the last layer with an indexer
        for i, function in enumerate(layers):
            hidden = hidden if s.joins is None else _joined(d, i, s.joins, hidden, begun, weights)
            source, own = i if s.keys_from is None else s.keys_from[i], weights.layer(i)
            gives = indexer.shared(s) and indexer.has(d, i)
            more = [*inputs[i], *(made[source] if s.borrows(i) else ()), *(() if gives else chosen)]
            hidden = d.builder.emit(
                relax.Call(function, [hidden, cache, relax.prim_value(places[source]), *more, *own])
            )
            if gives:
                hidden, *chosen = (d.builder.emit(relax.TupleGetItem(hidden, at)) for at in (0, 1))
            if s.keys_from is not None and not s.borrows(i):
                hidden, parts = (d.builder.emit(relax.TupleGetItem(hidden, at)) for at in (0, 1))
                made[i] = parts, per_layer.norm_of(d, i, own)
        return d.finished((hyper if s.hyper else streams).ended(d, hidden, weights), weights)

    return d.function("decoder", [x, cache, params], body, private=True)


def _joined(d: Decoder, i: int, joins: Sequence[int], x: Expr, begun: dict[int, Expr], weights: Weights) -> Expr:
    """What layer i is given for x [n, H], where layers are gone through in loops; `begun` is what stacks began with.

    Source: transformers modeling_hrm_text.py (Wang et al., arXiv 2506.21734).
    """
    emit = d.builder.emit
    if joins[i] >= 0 or i in joins:
        begun[i] = x = d.norm(x, weights, "loop_norm") if i else x
    x = emit(relax.op.add(x, begun[joins[i]])) if joins[i] >= 0 else x
    if i or "loop_start" not in weights:
        return x
    return emit(relax.op.add(x, d.cast(weights("loop_start").plain, d.operations.compute)))


def emit_entry_points(decoder: Decoder, run: Run, states: Sequence[str] = ("paged_kv_cache",)) -> None:
    """Add every public function of a model with a state to its builder; `run` emits a call of all its layers.

    A model that is there for the vectors of texts has no logits.
    """
    _emit_embed(decoder)
    _emit_select(decoder)
    chat = decoder.structure.embedding is None
    if chat:
        _emit_get_logits(decoder)
    for name, batch, tokens, rows in _FORWARD:
        if chat:
            _emit_forward(decoder, run, name, batch, tokens, rows, states)
        _emit_forward(decoder, run, f"{name}_to_last_hidden_states", batch, tokens, None, states)


def _emit_embed(d: Decoder) -> None:
    ids, params = d.tensor("input_ids", [tirx.Var("seq_len", "int64")], "int32"), d.params()
    d.function("embed", [ids, params], lambda: per_layer.embedded(d, ids, d.weights(params)))


def _emit_get_logits(d: Decoder) -> None:
    hidden = d.tensor("hidden_states", [tirx.Var("seq_len", "int64"), d.structure.hidden_size])
    params = d.params()
    d.function("get_logits", [hidden, params], lambda: d.logits(hidden, d.weights(params)))


def _emit_select(d: Decoder) -> None:
    hidden = d.tensor("hidden_states", [tirx.Var("seq_len", "int64"), d.structure.hidden_size])
    positions = d.tensor("logit_positions", [tirx.Var("batch_size", "int64")], "int32")
    d.function("batch_select_last_hidden_states", [hidden, positions], lambda: _take_rows(d, hidden, positions))


def _emit_forward(
    d: Decoder, run: Run, name: str, batch: int | None, tokens: int | None, rows: str | None, states: Sequence[str]
) -> None:
    """Hidden states of all tokens, or (where `rows` says which) their logits, paired with the states."""
    hidden_size = d.structure.hidden_size
    b = tirx.Var("batch_size", "int64") if batch is None else batch
    t = tirx.Var("seq_len", "int64") if tokens is None else tokens
    width = per_layer.width(d.structure)
    x = d.tensor("input_embeds", [b, t, width])
    held, params = [kv_cache(state) for state in states], d.params()
    positions = d.tensor("logit_positions", [tirx.Var("batch_size", "int64")], "int32")
    inputs = [x, *([positions] if rows == "positions" else []), *held, params]

    def body() -> tuple[Expr, ...]:
        flat = d.builder.emit(relax.op.reshape(x, [b * t, width]))
        hidden, *after = run(d.cast(flat, d.operations.compute), b, *held, params)
        if rows is None:
            return d.builder.emit(relax.op.reshape(d.cast(hidden, d.dtype), [b, t, hidden_size])), *after
        if rows == "last":
            hidden = d.builder.emit_te(_last_row, hidden, primfunc_name_hint="last_row")
        elif rows == "positions":
            hidden = _take_rows(d, hidden, positions)
        logits = d.logits(hidden, d.weights(params))
        first = [1, positions.ty.shape[0]] if rows == "positions" else [1, 1] if rows == "last" else [b, t]
        return d.builder.emit(relax.op.reshape(logits, [*first, logits.ty.shape[1]])), *after

    d.function(name, inputs, lambda: relax.Tuple(list(body())))


def _take_rows(d: Decoder, hidden: Expr, positions: Expr) -> Expr:
    return d.builder.emit_te(_rows, hidden, positions, primfunc_name_hint="take_rows")


def _rows(hidden: te.Tensor, positions: te.Tensor) -> te.Tensor:
    return te.compute((positions.shape[0], hidden.shape[1]), lambda i, k: hidden[positions[i], k], name="rows")


def _last_row(hidden: te.Tensor) -> te.Tensor:
    return te.compute((1, hidden.shape[1]), lambda _, k: hidden[hidden.shape[0] - 1, k], name="last_row")
