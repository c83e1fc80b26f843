"""One layer of a decoder: attention, MLP or experts, their norms, and how all are added to the residual."""

from __future__ import annotations

from functools import partial

from tvm import ir, relax, te, tirx

from mlcbuild.models import latent
from mlcbuild.models.decoder import Decoder, kv_cache
from mlcbuild.models.operations import Expr
from mlcbuild.models.rope import in_cache, inverse_frequencies, latent_factor, rotary
from mlcbuild.models.routers import choose
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Given


def layer_inputs(decoder: Decoder, number: int = 0) -> list[relax.Var]:
    """x [n, H] in the compute dtype, the KV cache, the layer's number in it, and the parameters of a layer in order."""
    d = decoder
    x = d.tensor("x", [tirx.Var("seq_len", "int64"), d.structure.hidden_size], d.operations.compute)
    return [x, kv_cache(), relax.Var("layer_id", ir.PrimType("int64")), *d.layer_parameters(number)]


def layer(decoder: Decoder, x: Expr, cache: Expr, layer_id: Expr, *given: Expr, number: int = 0) -> Expr:
    """One layer's computation on what `layer_inputs` describes: [n, H]. `number` is a layer of the same kind."""
    d, s = decoder, decoder.structure
    weight = d.given(number, given)
    pre, post, sums = (s.norm_position in kinds for kinds in (("pre", "both"), ("post", "both"), ("sum",)))

    def returned(y: Expr, role: str) -> Expr:
        """What attention or the MLP returns, as it is added."""
        y = d.norm(y, weight, role) if post else y
        return d.scaled(y, s.residual_scale)

    normed = d.norm(x, weight, "attention_norm") if pre and (number or s.norm_first) else x
    attended = attention(d, normed, cache, layer_id, weight, x.ty.shape[0], number)
    x1 = d.builder.emit(relax.op.add(x, returned(attended, "attention_post_norm")))
    x1 = d.norm(x1, weight, "attention_norm") if sums else x1
    parallel = s.residual == "parallel"
    if not parallel:
        normed = d.norm(x1, weight, "mlp_norm") if pre else x1
    elif "mlp_norm" in weight:
        normed = d.norm(x, weight, "mlp_norm")
    x2 = relax.op.add(x1, returned(mlp(d, normed, weight), "mlp_post_norm"))
    return d.norm(d.builder.emit(x2), weight, "mlp_norm") if sums else x2


def query_positions(d: Decoder, cache: Expr, n: Expr) -> Expr:
    """Each token's position in its sequence, which the KV cache knows: int32 [n]."""
    name = "vm.builtin.attention_kv_cache_get_query_positions"
    return d.builder.emit(relax.call_pure_packed(name, cache, ty_args=relax.TensorType([n], "int32")))


def attention(d: Decoder, x: Expr, cache: Expr, layer_id: Expr, weight: Given, n: Expr, number: int) -> Expr:
    """x [n, H] -> [n, H], through the KV cache's layer `layer_id`; `number` is a layer of the same kind as this one.

    The KV cache appends the keys and values, turns queries and keys by their positions where that is the same for all
    layers, and attends. A layer that sees a window of positions only gives the cache a negative scale: the cache tells
    its kernels nothing else about layers. The window and the soft cap are known to the kernels.
    """
    s = d.structure
    heads, kv_heads, dim = s.num_attention_heads, s.num_key_value_heads, s.head_dim
    if s.kv_lora_rank:
        qkv = latent.heads_of(d, x, weight)
    elif "qkv_proj" in weight:
        qkv = d.project(x, weight, "qkv", d.dtype)
    else:
        parts = [d.project(x, weight, name, d.dtype) for name in ("q", "k", "v")]
        qkv = d.builder.emit(relax.op.concat(parts, axis=1))
    if s.query_gate:
        qkv, gate = _gated_queries(d, qkv)
    if s.clip_qkv is not None:
        qkv = d.builder.emit(relax.op.clip(qkv, -s.clip_qkv, s.clip_qkv))
    qkv = d.builder.emit(relax.op.reshape(qkv, [n, heads + 2 * kv_heads, dim]))
    if not s.qk_norm_last:
        qkv = _normed_heads(d, qkv, weight)
    if s.position_scale is not None:
        qkv = d.builder.emit_te(
            partial(_scaled_queries, s), qkv, query_positions(d, cache, n), primfunc_name_hint="scaled"
        )
    kind = s.layer_type(number)
    if s.turns(number) and not in_cache(s):
        positions, table = query_positions(d, cache, n), inverse_frequencies(s, kind)
        qkv = d.operations.rope(qkv, positions, table, (heads, kv_heads), rotary(s, kind))
    if s.qk_norm_last:
        qkv = _normed_heads(d, qkv, weight)
    width = s.qk_head_dim or dim
    scale = width**-0.5 * latent_factor(s) if s.attention_scale is None else s.attention_scale
    slides = kind == "sliding" and s.sliding_window_size is not None
    out = d.builder.emit(
        relax.call_dps_packed(
            "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
            [cache, layer_id, relax.prim_value(-scale if slides else scale), qkv],
            out_ty=relax.TensorType([n, heads, dim], d.dtype),
        )
    )
    if s.value_head_dim not in (0, dim):
        out = latent.values_of(d, out)
    else:
        out = d.builder.emit(relax.op.reshape(out, [n, heads * dim]))
    if "attention_gate" in weight:
        gate = d.operations.linear(x, weight("attention_gate"), d.operations.compute)
    if "attention_gate" in weight or s.query_gate:
        gate = d.builder.emit(relax.op.sigmoid(gate))
        out = d.builder.emit(relax.op.multiply(gate, d.cast(out, d.operations.compute)))
    return d.project(out, weight, "o")


def _gated_queries(d: Decoder, qkv: Expr) -> tuple[Expr, Expr]:
    """Fused projections, a head's query followed by its gate: without gates, and the gates [n, A] (compute dtype)."""
    s, emit = d.structure, d.builder.emit
    n, width = qkv.ty.shape[0], s.num_attention_heads * s.head_dim
    both, rest = (emit(relax.TupleGetItem(relax.op.split(qkv, [2 * width], axis=1), i)) for i in range(2))
    pairs = emit(relax.op.split(emit(relax.op.reshape(both, [n, s.num_attention_heads, 2 * s.head_dim])), 2, axis=2))
    query, gate = (emit(relax.op.reshape(emit(relax.TupleGetItem(pairs, i)), [n, width])) for i in range(2))
    return emit(relax.op.concat([query, rest], axis=1)), d.cast(gate, d.operations.compute)


def _scaled_queries(s: Structure, qkv: te.Tensor, positions: te.Tensor) -> te.Tensor:
    """Fused heads with queries multiplied with a number that grows with their position (Llama 4's, Ministral 3's)."""

    def value(i: tirx.Var, h: tirx.Var, j: tirx.Var) -> Expr:
        times = tirx.floordiv(positions[i], s.position_scale_length).astype("float32")
        factor = 1 + tirx.const(s.position_scale, "float32") * tirx.log(1 + times)
        x = qkv[i, h, j]
        return tirx.if_then_else(h < s.num_attention_heads, (x.astype("float32") * factor).astype(x.dtype), x)

    return te.compute(qkv.shape, value, name="scaled")


def _normed_heads(d: Decoder, qkv: Expr, weight: Given) -> Expr:
    """Fused heads with queries and keys normed, where the model does that."""
    s = d.structure
    if s.qk_norm == "none":
        return qkv
    roles = ("q_norm", "k_norm", "q_norm_bias", "k_norm_bias")
    weights = [weight(role).plain if role in weight else None for role in roles]
    if not s.norm_weights:
        weights[:2] = [d.ones(s.head_dim)] * 2
    heads = s.num_attention_heads, s.num_key_value_heads
    return d.operations.norm_heads(qkv, tuple(weights), heads, s.qk_norm, s.norm, s.norm_eps)


def mlp(d: Decoder, x: Expr, weight: Given) -> Expr:
    """x [n, H] -> [n, H]: gated, with gate and up as one matrix or as two (Shazeer, arXiv 2002.05202), or plain.

    Experts, where the layer has a router to choose among them.
    """
    if "router" in weight:
        return _experts(d, x, weight)
    operations, activation = d.operations, d.structure.activation
    if "gate_up_proj" in weight:
        both = d.project(x, weight, "gate_up")
        if d.structure.gate == "first":
            inner = operations.gated(both, activation)
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


def _experts(d: Decoder, x: Expr, weight: Given) -> Expr:
    """x [n, H] -> [n, H]: a few gated MLPs of many, chosen token by token.

    y = sum over the chosen experts e of share_e * down_e(activation(gate_e(x)) * up_e(x)), and, where the model has
    shared experts, what those make of every token, times sigmoid(shared_gate · x) where there is such a gate (Jiang et
    al., arXiv 2401.04088; Dai et al., arXiv 2401.06066). Routers compute in float32,
    as transformers' and MLC's do (mlcbuild.models.routers).
    """
    s, o = d.structure, d.operations
    logits = o.linear(x, weight("router"), "float32")
    if s.scoring == "softmax" and s.expert_groups == 1 and "router_correction" not in weight:
        chosen, share = o.choose_experts(logits, s.num_experts_per_tok, s.norm_topk_prob, s.routed_scaling_factor)
    else:
        chosen, share = choose(d, logits, weight)
    inner = o.gated(o.expert_linear(x, chosen, weight("experts_gate_up_proj")), s.activation)
    out = o.weighted_sum(o.expert_linear(inner, chosen, weight("experts_down_proj")), share)
    if "shared_gate_up_proj" not in weight:
        return out
    shared = d.project(o.gated(d.project(x, weight, "shared_gate_up"), s.activation), weight, "shared_down")
    if "shared_gate" in weight:
        gate = d.builder.emit(relax.op.sigmoid(o.linear(x, weight("shared_gate"), o.compute)))
        shared = d.builder.emit(relax.op.multiply(gate, shared))
    return d.builder.emit(relax.op.add(out, shared))
