"""One layer of a decoder: attention, MLP or experts, their norms, and how all are added to the residual."""

from __future__ import annotations

from functools import partial

from tvm import ir, relax, te, tirx

from mlcbuild.models import attention_experts, heads, hyper, indexer, latent, per_layer, product_keys, streams
from mlcbuild.models.decoder import Decoder, kv_cache
from mlcbuild.models.experts import beside, experts, gated
from mlcbuild.models.operations import Expr
from mlcbuild.models.rope import in_cache, inverse_frequencies, latent_factor, rotary
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Given


def layer_inputs(decoder: Decoder, number: int = 0) -> list[relax.Var]:
    """What a layer is given: x [n, H] in the compute dtype, the KV cache, the layer's number in it, what
    mlcbuild.models.per_layer and indexer add, and its parameters in order.
    """
    d, n = decoder, tirx.Var("seq_len", "int64")
    awaiting = d.structure.shortcut and not any(p.role == "router" and p.of(number) for p in d.declared)
    x = d.tensor("x", [n, streams.width(d.structure) * (1 + awaiting)], d.operations.compute)
    more = [*per_layer.variables(d, number, n), *indexer.variables(d, number, n)]
    return [x, kv_cache(), relax.Var("layer_id", ir.PrimType("int64")), *more, *d.layer_parameters(number)]


def layer(decoder: Decoder, x: Expr, cache: Expr, layer_id: Expr, *given: Expr, number: int = 0) -> Expr:
    """One layer's computation on what `layer_inputs` describes: [n, H]. `number` is a layer of the same kind.

    With what its own keys and values are made of, or the keys that its indexer chose, where layers may borrow these;
    with `shortcut` [n, 2 H] goes to a layer without experts, the second half of which it adds.
    """
    d, s = decoder, decoder.structure
    count = len(given) - sum(p.layer == number for p in d.declared)
    more, weight = given[:count], d.given(number, given[count:])
    parts, late, chosen = None, None, None
    if s.shortcut and "router" not in weight:
        both = d.builder.emit(relax.op.split(x, 2, axis=1))
        x, late = (d.builder.emit(relax.TupleGetItem(both, i)) for i in range(2))
    pre, post, sums = (s.norm_position in kinds for kinds in (("pre", "both"), ("post", "both"), ("sum",)))

    def returned(y: Expr, role: str) -> Expr:
        """What attention or the MLP returns, as it is added."""
        y = d.norm(y, weight, role) if post or role in weight else y
        return d.scaled(y, s.residual_scale)

    def summed(x: Expr, normed: Expr, y: Expr, part: str) -> Expr:
        """x and what attention or the MLP makes of it; or x normed, moved to that by a rate for each column (nGPT,
        Loshchilov et al., arXiv 2410.01131)."""
        y = returned(y, f"{part}_post_norm")
        if f"{part}_rate" not in weight:
            return relax.op.add(d.shifted(x, weight, f"{part}_residual"), y)
        rate, way = d.cast(weight(f"{part}_rate").plain, d.operations.compute), relax.op.subtract(y, normed)
        return relax.op.add(normed, d.builder.emit(relax.op.multiply(rate, d.builder.emit(way))))

    def attend(normed: Expr) -> Expr:
        nonlocal parts, weight, chosen
        if s.keys_from is not None:
            parts = heads.parts_of(d, normed, weight, s.at(number))
            if s.borrows(number):
                pair, weight = per_layer.borrowed(d, number, (more[-2], more[-1]), weight)
                parts = [*parts, *pair]
        given = more[-1] if indexer.borrows(d, number) else None
        out, chosen = attention(d, normed, cache, layer_id, weight, x.ty.shape[0], number, parts, given)
        return out

    def with_keys(out: Expr) -> Expr:
        """The layer's result, with what others may borrow: what its own keys and values are made of, or its choice."""
        if indexer.shared(s) and chosen is not None:
            return relax.Tuple([d.builder.emit(out), chosen])
        if parts is None or s.borrows(number):
            return out
        return relax.Tuple([d.builder.emit(out), d.builder.emit(relax.op.concat(parts[1:], axis=1))])

    if s.hyper:
        x = hyper.around(d, x, weight, "attention", lambda one: attend(d.norm(one, weight, "attention_norm")))
        made = hyper.around(d, x, weight, "mlp", lambda one: mlp(d, d.norm(one, weight, "mlp_norm"), one, weight))
        return with_keys(made)
    if s.streams > 1:
        sparsity = s.at(number).activation_sparsity
        return with_keys(streams.layer(d, x, weight, more[0], attend, lambda y: _dense(d, y, weight, sparsity)))
    normed = d.norm(x, weight, "attention_norm") if pre and (number or s.norm_first) else x
    attended = attend(normed)
    x1 = d.builder.emit(summed(x, normed, attended, "attention"))
    x1 = d.norm(x1, weight, "attention_norm") if sums else x1
    parallel = s.residual == "parallel"
    if not parallel:
        normed = d.norm(x1, weight, "mlp_norm") if pre else x1
    elif "mlp_norm" in weight:
        normed = d.norm(x, weight, "mlp_norm")
    if s.shortcut:
        x2 = d.builder.emit(relax.op.add(x1, _dense(d, normed, weight)))
        if late is not None:
            return relax.op.add(x2, late)
        return relax.op.concat([x2, experts(d, normed, normed, weight)], axis=1)
    x2 = summed(x1, normed, mlp(d, normed, x1, weight), "mlp")
    if s.per_layer_size:
        x2 = per_layer.added(d, d.builder.emit(x2), more[0], weight)
    if "layer_scale" in weight:
        x2 = relax.op.multiply(d.builder.emit(x2), d.cast(weight("layer_scale").plain, d.operations.compute))
    return with_keys(d.norm(d.builder.emit(x2), weight, "mlp_norm") if sums else x2)


def query_positions(d: Decoder, cache: Expr, n: Expr) -> Expr:
    """Each token's position in its sequence, which the KV cache knows: int32 [n]."""
    name = "vm.builtin.attention_kv_cache_get_query_positions"
    return d.builder.emit(relax.call_pure_packed(name, cache, ty_args=relax.TensorType([n], "int32")))


def attention(
    d: Decoder,
    x: Expr,
    cache: Expr,
    layer_id: Expr,
    weight: Given,
    n: Expr,
    number: int,
    parts: list[Expr] | None = None,
    chosen: Expr | None = None,
) -> tuple[Expr, Expr | None]:
    """x [n, H] -> [n, H], through the KV cache's layer `layer_id`; `number` is a layer of the same kind as this one.
    And the keys that its indexer chose (mlcbuild.models.indexer); `chosen` are those of another layer.

    The KV cache appends the keys and values, turns queries and keys by their positions where that is the same for all
    layers, and attends. A layer that sees a window of positions only gives the cache a negative scale: the cache tells
    its kernels nothing else about layers. The window and the soft cap are known to the kernels. `parts` are
    queries, keys and values, where they are made already.
    """
    s, own = d.structure, d.structure.at(number)
    key, value = heads.widths(own)
    choice = attention_experts.choose(d, x, weight) if "attention_router" in weight else None
    gate, narrow = None, None
    positions = partial(query_positions, d, cache, n)
    if choice is not None:
        qkv = attention_experts.heads_of(d, x, choice, weight)
    elif s.kv_lora_rank:
        qkv, gate, narrow = latent.heads_of(d, x, own, weight, positions, s.turns(number))
    elif "qkv_proj" in weight:
        qkv = d.project(x, weight, "qkv", d.dtype)
    else:
        qkv = d.builder.emit(relax.op.concat(parts or heads.parts_of(d, x, weight, own), axis=1))
    if s.query_gate and gate is None:
        qkv, gate = _gated_queries(d, qkv)
    if s.clip_qkv is not None:
        qkv = d.builder.emit(relax.op.clip(qkv, -s.clip_qkv, s.clip_qkv))
    if key == value and not s.kv_lora_rank:
        rows = own.num_attention_heads + 2 * own.num_key_value_heads
        qkv = d.builder.emit(relax.op.reshape(qkv, [n, rows, key]))
    if not s.qk_norm_last:
        qkv = _normed_heads(d, qkv, own, weight, s.turns(number))
    if s.position_scale is not None and not (s.position_scale_unturned and s.turns(number)):
        qkv = d.builder.emit_te(partial(_scaled_queries, own), qkv, positions(), primfunc_name_hint="scaled")
    kind = s.layer_type(number)
    if not s.kv_lora_rank:
        qkv = heads.in_cache(d, qkv, own, weight)
    if s.turns(number) and not (s.absorbed or in_cache(s)):
        both = s.num_attention_heads, s.num_key_value_heads
        qkv = d.operations.rope(qkv, positions(), inverse_frequencies(own, kind), both, rotary(own, kind))
    if s.qk_norm_last:
        qkv = _normed_heads(d, qkv, own, weight, s.turns(number))
    if "query_scale" in weight:
        qkv = d.builder.emit_te(_times_queries, qkv, weight("query_scale").plain, primfunc_name_hint="scaled")
    scale = key**-0.5 * latent_factor(s) if s.attention_scale is None else s.attention_scale
    cached, _, width = s.cache_heads
    slides = kind == "sliding" and s.sliding_window_size is not None
    scale = -scale if slides else scale

    def through(qkv: Expr, scale: float) -> Expr:
        call = relax.call_dps_packed(
            "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
            [cache, layer_id, relax.prim_value(scale), qkv],
            out_ty=relax.TensorType([n, cached, width], d.dtype),
        )
        return d.builder.emit(call)

    if s.indexer:
        out, chosen = indexer.attended(d, qkv, x, narrow, own, weight, positions, chosen, through, scale)
    else:
        out = through(qkv, scale)
    values = latent.values_of(d, out, weight) if s.absorbed else heads.values_of(d, out, own)
    out = heads.gated(d, d.scaled(values, s.value_scale), x, own, weight)
    out = heads.difference(d, out, own, weight) if own.differential else out
    if gate is not None:
        gate = d.builder.emit(relax.op.sigmoid(gate))
        out = d.builder.emit(relax.op.multiply(gate, d.cast(out, d.operations.compute)))
    out = d.norm(d.cast(out, d.operations.compute), weight, "o_norm") if "o_norm" in weight or s.inner_norms else out
    out = d.project(out, weight, "o") if choice is None else attention_experts.returned(d, out, choice, weight)
    return out, chosen


def _gated_queries(d: Decoder, qkv: Expr) -> tuple[Expr, Expr]:
    """Fused projections, a head's query followed by its gate: without gates, and the gates [n, A] (compute dtype)."""
    s, emit = d.structure, d.builder.emit
    n, width = qkv.ty.shape[0], s.num_attention_heads * s.head_dim
    both, rest = (emit(relax.TupleGetItem(relax.op.split(qkv, [2 * width], axis=1), i)) for i in range(2))
    pairs = emit(relax.op.split(emit(relax.op.reshape(both, [n, s.num_attention_heads, 2 * s.head_dim])), 2, axis=2))
    query, gate = (emit(relax.op.reshape(emit(relax.TupleGetItem(pairs, i)), [n, width])) for i in range(2))
    return emit(relax.op.concat([query, rest], axis=1)), d.cast(gate, d.operations.compute)


def _scaled_queries(s: Structure, qkv: te.Tensor, positions: te.Tensor) -> te.Tensor:
    """Fused heads with queries multiplied with a number that grows with their position (Llama 4's, Beam's)."""

    def value(i: tirx.Var, h: tirx.Var, j: tirx.Var) -> Expr:
        position = positions[i] + (1 if s.position_scale_unturned else 0)
        times = tirx.floordiv(position, s.position_scale_length).astype("float32")
        factor = 1 + tirx.const(s.position_scale, "float32") * tirx.log(1 + times)
        if s.position_scale_power:
            part = (positions[i] + 1).astype("float32") / tirx.const(s.position_scale_length, "float32")
            factor = tirx.exp(tirx.const(s.position_scale, "float32") * tirx.log(1 + part))
        x = qkv[i, h, j]
        return tirx.if_then_else(h < s.num_attention_heads, (x.astype("float32") * factor).astype(x.dtype), x)

    return te.compute(qkv.shape, value, name="scaled")


def _times_queries(qkv: te.Tensor, factors: te.Tensor) -> te.Tensor:
    """Fused heads with each number of a query times its own: float32 [heads * D]."""
    width = qkv.shape[2]

    def value(i: tirx.Var, h: tirx.Var, j: tirx.Var) -> Expr:
        times = factors[tirx.min(h * width + j, factors.shape[0] - 1)]
        x = qkv[i, h, j]
        return tirx.if_then_else(h * width < factors.shape[0], (x.astype("float32") * times).astype(x.dtype), x)

    return te.compute(qkv.shape, value, name="scaled")


def _normed_heads(d: Decoder, qkv: Expr, own: Structure, weight: Given, turned: bool) -> Expr:
    """Fused heads with queries and keys normed, where the model does that."""
    s = d.structure
    if s.qk_norm == "none" or (s.qk_norm == "unit" and not turned):
        return qkv
    roles = ("q_norm", "k_norm", "q_norm_bias", "k_norm_bias")
    weights = [weight(role).plain if role in weight else None for role in roles]
    eps = s.norm_eps
    if not s.norm_weights or s.qk_norm == "unit":
        ones, eps = d.unweighted(heads.widths(own)[0], eps)
        weights[:2] = [ones] * 2
    both = own.num_attention_heads, own.num_key_value_heads
    spans = "head" if s.qk_norm == "unit" else s.qk_norm
    return d.operations.norm_heads(qkv, tuple(weights), both, spans, s.norm, eps)


def mlp(d: Decoder, x: Expr, before: Expr, weight: Given) -> Expr:
    """x [n, H] -> [n, H]: gated, with gate and up as one matrix or as two (Shazeer, arXiv 2002.05202), or plain.

    Experts, where the layer has a router to choose among them; beside a plain MLP they see `before` [n, H], x unnormed.
    """
    if "router" in weight:
        return beside(d, _dense(d, x, weight), before, weight) if "down_proj" in weight else experts(d, x, x, weight)
    made = _dense(d, x, weight)
    return d.builder.emit(relax.op.add(made, product_keys.made(d, x, weight))) if "key_router" in weight else made


def _dense(d: Decoder, x: Expr, weight: Given, sparsity: float = 0.0) -> Expr:
    operations, activation = d.operations, d.structure.activation
    if "gate_up_proj" in weight:
        both = d.project(x, weight, "gate_up")
        both = streams.cut(d, both, sparsity) if sparsity else both
        if d.structure.gate == "first":
            inner = gated(d, both, d.structure.swiglu_limit if d.structure.swiglu_dense else None)
        else:
            halves = d.builder.emit(relax.op.split(both, 2, axis=1))
            up, gate = (d.builder.emit(relax.TupleGetItem(halves, i)) for i in range(2))
            inner = d.builder.emit(relax.op.multiply(operations.activation(gate, activation), up))
    elif "gate_proj" in weight:
        gate = operations.activation(d.scaled(d.project(x, weight, "gate"), d.structure.gate_scale), activation)
        inner = d.builder.emit(relax.op.multiply(gate, d.project(x, weight, "up")))
    else:
        inner = d.project(x, weight, "up")
        inner = _xielu(d, inner, weight) if activation == "xielu" else operations.activation(inner, activation)
    inner = d.norm(inner, weight, "down_norm") if "down_norm" in weight or d.structure.inner_norms else inner
    return d.project(inner, weight, "down")


def _xielu(d: Decoder, x: Expr, weight: Given) -> Expr:
    """x [n, I] -> p * x ** 2 + x / 2 above 0, else (1 / 2 + n) * (exp(x) - 1 - x) + x / 2 (Huang, arXiv 2411.13010)."""

    def value(given: Expr, p: Expr, n: Expr) -> Expr:
        x, half = given.astype("float32"), tirx.const(0.5, "float32")
        low = tirx.exp(tirx.min(x, tirx.const(0, "float32"))) - 1 - x
        return (half * x + tirx.if_then_else(x > 0, p * x * x, (half + n) * low)).astype(given.dtype)

    def table(x: te.Tensor, p: te.Tensor, n: te.Tensor) -> te.Tensor:
        return te.compute(x.shape, lambda i, j: value(x[i, j], p[0], n[0]), name="xielu")

    trained = (d.cast(weight(f"xielu_{side}").plain, "float32") for side in ("positive", "negative"))
    return d.builder.emit_te(table, x, *trained, primfunc_name_hint="xielu")
