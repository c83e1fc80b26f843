"""A layer's heads in the KV cache, whose heads are as many and as wide for all layers as the largest layer needs.

    keys and values   a head that the layer has is there once, or several times where the cache has more heads
    queries           go to the cache's heads that hold their key; what is left over is zeros
    width             what a layer's heads do not have is zeros: scores and values are the same

A sink (`sinks`, a logit for each head that takes a share of the attention and gives nothing; Xiao et al., arXiv
2309.17453, as gpt-oss trains them) is the last number of a query. Keys have a zero there, so scores do not see it; the
attention kernels do (docs/attention.md). A layer without sinks in a model with some gives the lowest score.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import relax, te, tirx

from mlcbuild.models.decoder import Decoder
from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent.mixing import softplus
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Given

NO_SINK = -3e4  # fits into float16; its share of any attention is 0


def widths(own: Structure) -> tuple[int, int]:
    """Numbers of a head's query and key, and of its value."""
    return own.qk_head_dim or own.head_dim, own.value_head_dim or own.head_dim


def in_cache(d: Decoder, qkv: Expr, own: Structure, weight: Given) -> Expr:
    """Queries, keys and values of a layer, [n, ...], as the KV cache has them: [n, heads + 2 * kv heads, D]."""
    s, (n, width) = d.structure, (qkv.ty.shape[0], qkv.ty.shape[-1])
    heads = s.num_attention_heads + 2 * s.num_key_value_heads
    if (heads, s.head_dim) == (own.num_attention_heads + 2 * own.num_key_value_heads, width):
        return qkv
    flat = qkv if len(qkv.ty.shape) == 2 else d.builder.emit(relax.op.reshape(qkv, [n, qkv.ty.shape[1] * width]))
    sinks = [d.cast(weight("sinks").plain, "float32")] if "sinks" in weight else []
    whole = d.builder.emit_te(partial(_whole, s, own), flat, *sinks, primfunc_name_hint="cache_heads")
    return _with_steps(d, whole, flat, own, weight) if "key_step_proj" in weight else whole


def _with_steps(d: Decoder, whole: Expr, flat: Expr, own: Structure, weight: Given) -> Expr:
    """Heads of the cache, the last number of each key being what is added to its scores, that of each query 1.

    A key's is exp(key_rate * softplus(key_step_proj values)), over the scale of scores (Doge's mask; arXiv 2508.02124).
    """
    heads, width = own.num_attention_heads, widths(own)[0]
    at = (heads + own.num_key_value_heads) * width
    values = d.builder.emit(relax.TupleGetItem(d.builder.emit(relax.op.split(flat, [at], axis=1)), 1))
    steps = d.project(values, weight, "key_step")

    def table(whole: te.Tensor, steps: te.Tensor, rate: te.Tensor) -> te.Tensor:
        def number(i: Any, h: Any, j: Any) -> Any:
            key = tirx.min(tirx.max(h - heads, 0), own.num_key_value_heads - 1)
            added = te.exp(rate[key].astype("float32") * softplus(steps[i, key].astype("float32"))) * width**0.5
            of_key = tirx.if_then_else(h < heads + own.num_key_value_heads, added.astype(whole.dtype), whole[i, h, j])
            last = tirx.if_then_else(h < heads, tirx.const(1, whole.dtype), of_key)
            return tirx.if_then_else(j == whole.shape[2] - 1, last, whole[i, h, j])

        return te.compute(whole.shape, number, name="key_steps")

    return d.builder.emit_te(table, whole, steps, weight("key_rate").plain, primfunc_name_hint="key_steps")


def values_of(d: Decoder, out: Expr, own: Structure) -> Expr:
    """What attention returns [n, heads, D], as the layer's own: [n, heads * width of a value]."""
    s, (_, width) = d.structure, widths(own)
    if (own.num_attention_heads, width) == (s.num_attention_heads, s.head_dim) and not s.indexer:
        return d.builder.emit(relax.op.reshape(out, [out.ty.shape[0], own.num_attention_heads * width]))
    return d.builder.emit_te(partial(_own, s, own), out, primfunc_name_hint="own_heads")


def parts_of(d: Decoder, x: Expr, weight: Given, own: Structure) -> list[Expr]:
    """Queries, keys and values, each [n, heads * width], of a layer that has a matrix for each; or queries alone."""
    parts = [d.project(x, weight, name, d.dtype) for name in ("q", "k", "v") if f"{name}_proj" in weight]
    if len(parts) == 1:
        return parts
    parts = [*parts, parts[1]] if len(parts) == 2 else parts
    if own.differential:
        return [*parts[:2], _both_halves(d, parts[2], own)]
    return [*parts[:2], normed_values(d, parts[2], own) if own.value_norm else parts[2]]


def _both_halves(d: Decoder, values: Expr, own: Structure) -> Expr:
    """Values [n, kv heads * D] of differential attention -> [n, kv heads * 2 D].

    Head i of the first half of heads has a value with head i of the second one, and both have that pair.
    """
    n, half, width = values.ty.shape[0], own.num_key_value_heads // 2, widths(own)[1] // 2
    apart = d.builder.emit(relax.op.reshape(values, [n, 2, half, width]))
    pairs = d.builder.emit(relax.op.permute_dims(apart, [0, 2, 1, 3]))
    flat = d.builder.emit(relax.op.reshape(pairs, [n, half * 2 * width]))
    return d.builder.emit(relax.op.concat([flat, flat], axis=1))


def difference(d: Decoder, out: Expr, own: Structure, weight: Given) -> Expr:
    """What the heads return [n, heads * 2 D] -> [n, heads * D]: the second half's part taken from the first, normed."""
    (n, total), width, numbers = out.ty.shape, widths(own)[1], weight("difference").plain
    rows = n * (own.num_attention_heads // 2)
    less = d.cast(d.builder.emit_te(_less, out, numbers, primfunc_name_hint="difference"), d.operations.compute)
    normed = d.operations.rms_norm(
        d.builder.emit(relax.op.reshape(less, [rows, width])), d.ones(width), d.structure.norm_eps
    )
    whole = d.builder.emit(relax.op.reshape(normed, [n, total // 2]))
    return d.builder.emit_te(_times_second, whole, numbers, primfunc_name_hint="difference_scaled")


def _less(x: te.Tensor, numbers: te.Tensor) -> te.Tensor:
    """float32 [n, W] of x [n, 2 W]: the first half of columns less numbers[0] times the second."""
    width = x.shape[1] // 2
    return te.compute(
        (x.shape[0], width),
        lambda i, j: x[i, j].astype("float32") - numbers[0] * x[i, j + width].astype("float32"),
        name="difference",
    )


def _times_second(x: te.Tensor, numbers: te.Tensor) -> te.Tensor:
    return te.compute(
        x.shape, lambda i, j: (x[i, j].astype("float32") * numbers[1]).astype(x.dtype), name="difference_scaled"
    )


def normed_values(d: Decoder, values: Expr, own: Structure) -> Expr:
    """Values [n, kv heads * width], each head normed without a weight, in the model dtype."""
    shape, (_, width) = list(values.ty.shape), widths(own)
    rows = d.builder.emit(relax.op.reshape(values, [shape[0] * own.num_key_value_heads, width]))
    rows = d.operations.rms_norm(d.cast(rows, d.operations.compute), d.ones(width), own.norm_eps)
    return d.cast(d.builder.emit(relax.op.reshape(rows, shape)), d.dtype)


def gated(d: Decoder, out: Expr, x: Expr, own: Structure, weight: Given) -> Expr:
    """What attention returns [n, heads * width], times a gate that x [n, H] makes: of each number, or of each head."""
    role = next((role for role in ("attention_gate", "attention_head_gate") if role in weight), None)
    if role is None:
        return out
    compute, emit = d.operations.compute, d.builder.emit
    gate = d.operations.linear(x, weight(role), compute)
    if "attention_gate_scale" in weight:
        gate = emit(relax.op.multiply(gate, d.cast(weight("attention_gate_scale").plain, compute)))
    if "attention_gate_bias" in weight:
        gate = d.builder.emit_te(_with_head_bias, gate, weight("attention_gate_bias").plain, primfunc_name_hint="gates")
    gate = (
        d.builder.emit_te(_softplus, gate) if d.structure.attention_gate == "softplus" else emit(relax.op.sigmoid(gate))
    )
    out, shape = d.cast(out, compute), list(out.ty.shape)
    if role == "attention_gate":
        return emit(relax.op.multiply(gate, out))
    by_head = [shape[0], own.num_attention_heads, widths(own)[1]]
    gate = emit(relax.op.reshape(gate, [*by_head[:2], 1]))
    product = emit(relax.op.multiply(gate, emit(relax.op.reshape(out, by_head))))
    return emit(relax.op.reshape(product, shape))


def _with_head_bias(gate: te.Tensor, bias: te.Tensor) -> te.Tensor:
    """Gates [n, heads * width], each head's plus its number of [heads]."""
    width = gate.shape[1] // bias.shape[0]
    return te.compute(gate.shape, lambda i, j: gate[i, j] + bias[j // width].astype(gate.dtype), name="gates")


def _softplus(x: te.Tensor) -> te.Tensor:
    return te.compute(x.shape, lambda i, j: softplus(x[i, j].astype("float32")).astype(x.dtype), name="softplus")


def _groups(s: Structure, own: Structure) -> tuple[int, int, int]:
    """How often a key is there, how many queries it has in the cache, and how many of these are the layer's."""
    times = s.num_key_value_heads // own.num_key_value_heads
    return times, s.num_attention_heads // own.num_key_value_heads, own.num_attention_heads // own.num_key_value_heads


def _whole(s: Structure, own: Structure, flat: te.Tensor, *sinks: te.Tensor) -> te.Tensor:
    (times, places, mine), (width, values) = _groups(s, own), widths(own)
    heads, kv_heads = own.num_attention_heads, own.num_key_value_heads
    has_sinks = "sinks" in s.roles()
    zero = tirx.const(0, flat.dtype)

    def number(i: Any, h: Any, j: Any) -> Any:
        query = h // places * mine + h % places
        at_end = (
            tirx.if_then_else(h % places < mine, sinks[0][query], NO_SINK) if sinks else tirx.const(NO_SINK, "float32")
        )
        rest = tirx.if_then_else(j == s.head_dim - 1, at_end.astype(flat.dtype), zero) if has_sinks else zero
        of_query = tirx.if_then_else(tirx.all(h % places < mine, j < width), flat[i, query * width + j], rest)
        key = (h - s.num_attention_heads) // times
        of_key = tirx.if_then_else(j < width, flat[i, (heads + key) * width + j], zero)
        value = (h - s.num_attention_heads - s.num_key_value_heads) // times
        of_value = tirx.if_then_else(j < values, flat[i, (heads + kv_heads) * width + value * values + j], zero)
        of_pair = tirx.if_then_else(h < s.num_attention_heads + s.num_key_value_heads, of_key, of_value)
        return tirx.if_then_else(h < s.num_attention_heads, of_query, of_pair)

    shape = (flat.shape[0], s.num_attention_heads + 2 * s.num_key_value_heads, s.head_dim)
    return te.compute(shape, number, name="cache_heads")


def _own(s: Structure, own: Structure, out: te.Tensor) -> te.Tensor:
    (_, places, mine), (_, width) = _groups(s, own), widths(own)

    def number(i: Any, j: Any) -> Any:
        head = j // width
        return out[i, head // mine * places + head % mine, j % width]

    return te.compute((out.shape[0], own.num_attention_heads * width), number, name="own_heads")
