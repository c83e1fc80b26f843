"""The functions of a hybrid's library: a private layer for each kind, one private model, the entry points around it.

Private functions work on [n, H], `n` tokens of `b` sequences of equal length. They are given the KV cache, in which
layers with attention are counted from 0, and the state, in which those with a mixer are; the state is handed on as an
object. A layer is x + mixed(norm(x)), then x + mlp(norm(x)), with the norms, before and after, that it has weights for;
with `residual_normed`, norm(x) is added to; where there are several hidden states, a mixture of them takes norm(x)'s
place (mlcbuild.models.hybrid.residuals). With `attention_into_mixer` layers with attention are given the embeddings
besides, and all is x + mixed(norm(x + what attention and MLP make)).
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import ir, relax, tirx

from mlcbuild.models import per_layer
from mlcbuild.models.decoder import Decoder, kv_cache, numbered, one_per_kind
from mlcbuild.models.entry_points import emit_entry_points
from mlcbuild.models.experts import experts
from mlcbuild.models.hybrid import convolution, convolved, delta, lightning, ngrams, residuals, rglru
from mlcbuild.models.layer import attention, mlp, query_positions
from mlcbuild.models.mixers import mixer_of
from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent import state_space
from mlcbuild.models.recurrent.layers import Layer
from mlcbuild.models.recurrent.operations import Recurrence, Slot, State
from mlcbuild.models.routers import narrow
from mlcbuild.models.structure import ATTENDING, KEEPING, Structure

_MIXED = {
    "conv": convolution.mixed,
    **dict.fromkeys(("mamba", "mamba2"), state_space.mixed),
    **dict.fromkeys(("delta", "kda"), delta.mixed),
    "rglru": rglru.mixed,
    "lightning": lightning.mixed,
}
_SLOTS = {"conv": convolution.slots, "rglru": rglru.slots, "lightning": lightning.slots}


def slots(s: Structure) -> tuple[Slot, ...]:
    """What each layer with a state keeps per sequence: what its mixer does, then its attention, then its n-grams."""
    return (*_mixers(s), *convolved.slots(s), *ngrams.slots(s))


def _mixers(s: Structure) -> tuple[Slot, ...]:
    return _SLOTS.get(s.mixer, state_space.kept)(mixer_of(s)) if s.mixer else ()


def emit_hybrid(decoder: Decoder, recurrence: Recurrence) -> None:
    """Add every public function of a hybrid to its builder, but those that create its cache and its state."""
    d = decoder
    run = _emit_model(d, one_per_kind(d, lambda number: _emit_layer(d, recurrence, number)))

    def forward(x: Expr, batch: Expr, cache: Expr, state: Expr, params: Expr) -> tuple[Expr, ...]:
        """The hidden states after x [n, H], the cache, which stays the object that it was, and the state."""
        both = d.builder.emit(relax.Call(run, [x, relax.ShapeExpr([batch]), cache, state, params]))
        hidden, after = (d.builder.emit(relax.TupleGetItem(both, i)) for i in (0, 1))
        return hidden, cache, after

    emit_entry_points(d, forward, ("paged_kv_cache", "rnn_state"))


def _emit_layer(d: Decoder, recurrence: Recurrence, number: int) -> relax.GlobalVar:
    """Add `hybrid_layer(x [n, H], batch shape, cache, state, numbers in both, parameters...) -> ([n, H], state)`."""
    batch = tirx.Var("batch_size", "int64")
    x, cache, state = _hidden(d, width=residuals.width(d.structure)), kv_cache(), kv_cache("rnn_state")
    places = [relax.Var(name, ir.PrimType("int64")) for name in ("layer_id", "state_id")]
    given, more = d.layer_parameters(number), [_hidden(d, x, "embeddings")] if _wide(d.structure, number) else []
    more += [_hidden(d, x, "tokens", 1)] if d.structure.at(number).ngram_table else []
    inputs = [x, relax.Var("batch", relax.ShapeType([batch])), cache, state, *places, *more, *given]

    def body() -> Expr:
        weight = d.given(number, given)
        held = State(d.builder, state, places[1], batch, slots(d.structure))
        at = Layer(d, recurrence, held, weight, lambda: query_positions(d, cache, x.ty.shape[0]))
        into = d.structure.attention_into_mixer
        hidden = (_into_mixer if into else _layer)(at, x, cache, places[0], number, *more)
        return relax.Tuple([hidden, held.expression])

    return d.function(numbered("hybrid_layer", number), inputs, body, private=True)


def _wide(s: Structure, number: int) -> bool:
    """Whether a layer is given embeddings beside hidden states."""
    return s.attention_into_mixer and s.layer_type(number) in ATTENDING


def _into_mixer(at: Layer, x: Expr, cache: Expr, layer_id: Expr, number: int, *embeddings: Expr) -> Expr:
    d, weight, given = at.decoder, at.weight, x
    if embeddings:
        both = d.norm(d.builder.emit(relax.op.concat([x, *embeddings], axis=1)), weight, "attention_norm")
        attended, _ = attention(d, both, cache, layer_id, weight, x.ty.shape[0], number)
        made = mlp(d, d.norm(attended, weight, "mlp_norm"), attended, weight)
        given = at.add(x, d.project(made, weight, "into_mixer"))
    return at.add(x, _MIXED[d.structure.mixer](at, d.norm(given, weight, "mixer_norm")))


def _layer(at: Layer, x: Expr, cache: Expr, layer_id: Expr, number: int, *tokens: Expr) -> Expr:
    d, s, weight = at.decoder, at.decoder.structure, at.weight
    if tokens:
        x = ngrams.added(at, x, tokens[0], s.at(number).ngram_table, len(slots(s)) - 2)
    x, routed = residuals.apart(d, x)

    def normed(y: Expr, role: str) -> Expr:
        return d.norm(y, weight, role) if role in weight else y

    def given(x: Expr, part: str) -> tuple[Expr, Expr | None]:
        return residuals.mixture(d, x, weight, part) if s.mixture_rank else (normed(x, f"{part}_norm"), None)

    def added(x: Expr, inner: Expr, *ys: Expr, part: str, share: Expr | None) -> Expr:
        for y in ys[1:]:
            ys = (at.add(ys[0], y),)
        if share is not None:
            return residuals.injected(d, x, ys[0], share)
        kept = d.scaled(d.shifted(inner if s.residual_normed else x, weight, f"{part}_residual"), s.kept_scale)
        returned = d.shifted(normed(ys[0], f"{part}_post_norm"), weight, f"{part}_returned")
        return at.add(kept, d.scaled(returned, s.residual_scale))

    kind, (inner, share) = s.layer_type(number), given(x, "attention")
    mixed = []
    if kind in KEEPING:
        mixed.append(d.scaled(_MIXED[s.mixer](at, d.scaled(inner, s.mixer_scale)), s.mixer_out_scale))
    if kind in ATTENDING:
        seen = d.scaled(inner, s.attention_in_scale)
        parts = convolved.heads_of(at, seen, len(_mixers(s))) if s.convolutions else None
        attended, _ = attention(d, seen, cache, layer_id, weight, x.ty.shape[0], number, parts)
        mixed.append(d.scaled(attended, s.attention_out_scale))
    if mixed:
        x = added(x, inner, *mixed, part="attention", share=share)
    if "down_proj" in weight or "router" in weight:
        inner, share = given(x, "mlp")
        if routed is None:
            returned = mlp(d, inner, x, weight)
        else:
            rows, routed = narrow(d, inner, routed, weight)
            returned = experts(d, inner, rows, weight)
        x = added(x, inner, d.scaled(returned, s.mlp_out_scale), part="mlp", share=share)
    return x if routed is None else d.builder.emit(relax.op.concat([x, routed], axis=1))


def _emit_model(d: Decoder, functions: Sequence[relax.GlobalVar]) -> relax.GlobalVar:
    """Add `model(x [n, H], batch shape, cache, state, params) -> ([n, H], state)`: what is around the layers, too."""
    s = d.structure
    x, cache, state, params = _hidden(d, width=per_layer.width(s)), kv_cache(), kv_cache("rnn_state"), d.params()
    shape = relax.Var("batch", relax.ShapeType([tirx.Var("batch_size", "int64")]))
    places = [{layer: place for place, layer in enumerate(layers)} for layers in (s.numbers(*ATTENDING), s.keeping)]

    def body() -> Expr:
        weights = d.weights(params)
        rows, tokens = per_layer.tokens(d, x)
        first = d.beginning(rows, lambda: query_positions(d, cache, x.ty.shape[0]), weights)
        hidden, after = residuals.started(d, first), state
        for number, function in enumerate(functions):
            where = [relax.prim_value(place.get(number, 0)) for place in places]
            more = [first] if _wide(s, number) else [tokens] if s.at(number).ngram_table else []
            inputs = [hidden, shape, cache, after, *where, *more, *weights.layer(number)]
            both = d.builder.emit(relax.Call(function, inputs))
            hidden, after = (d.builder.emit(relax.TupleGetItem(both, i)) for i in (0, 1))
        return relax.Tuple([residuals.ended(d, hidden, weights), after])

    return d.function("hybrid_model", [x, shape, cache, state, params], body, private=True)


def _hidden(d: Decoder, like: Expr | None = None, name: str = "x", width: int = 0) -> relax.Var:
    """float32 [n, H], or so wide, with the n of another."""
    n = tirx.Var("seq_len", "int64") if like is None else like.ty.shape[0]
    return d.tensor(name, [n, width or d.structure.hidden_size], "float32")
