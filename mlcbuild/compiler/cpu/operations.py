"""The decoder's operations on the CPU."""

from __future__ import annotations

from functools import partial

from tvm import relax, sym

from mlcbuild.compiler import emit
from mlcbuild.compiler.cpu import experts, linear, rows
from mlcbuild.compiler.cpu.formats import format_of
from mlcbuild.models.operations import Expr, Operations
from mlcbuild.models.rope import Frequencies, Rotary
from mlcbuild.models.weights import Weight

COMPUTE = "float32"  # every kernel computes in it, so rounding activations to float16 in between would only lose


def operations(builder: relax.BlockBuilder, dtype: str) -> Operations:
    """Operations that emit into `builder`; `dtype` is the model dtype."""

    call = partial(emit.call, builder)

    def multiply(x: Expr, weight: Weight, out_dtype: str) -> Expr:
        n, in_features = x.ty.shape
        function = linear.linear(
            *(format_of(weight.packing), _parts(weight), emit.size(weight.rows)),
            *(int(in_features), str(x.ty.dtype), out_dtype),
        )
        return call(function, "linear", [x, *weight.parts.values()], [n, weight.rows], out_dtype)

    def embedding(ids: Expr, weight: Weight, hidden_size: int) -> Expr:
        function = linear.embedding(format_of(weight.packing), _parts(weight), hidden_size, dtype)
        return call(function, "embedding", [ids, *weight.parts.values()], [ids.ty.shape[0], hidden_size], dtype)

    def rms_norm(x: Expr, weight: Expr, eps: float) -> Expr:
        return call(rows.rms_norm(int(x.ty.shape[1]), eps, dtype), "rms_norm", [x, weight], list(x.ty.shape), COMPUTE)

    def layer_norm(x: Expr, weight: Expr | None, bias: Expr | None, eps: float) -> Expr:
        given = [each for each in (weight, bias) if each is not None]
        function = rows.layer_norm(int(x.ty.shape[1]), eps, dtype, weight is not None, bias is not None)
        return call(function, "layer_norm", [x, *given], list(x.ty.shape), COMPUTE)

    def gated(x: Expr, name: str) -> Expr:
        width = int(x.ty.shape[1]) // 2
        return call(rows.gated(name, width), "gated", [x], [x.ty.shape[0], width], COMPUTE)

    def activation(x: Expr, name: str) -> Expr:
        width = int(x.ty.shape[1])
        return call(rows.activation(name, width), "activation", [x], [x.ty.shape[0], width], COMPUTE)

    def norm_heads(
        qkv: Expr, weights: tuple[Expr | None, ...], heads: tuple[int, int], spans: str, norm: str, eps: float
    ) -> Expr:
        shapes = tuple(None if each is None else tuple(int(size) for size in each.ty.shape) for each in weights)
        given = [each for each in weights if each is not None]
        described = rows.Heads(*heads, int(qkv.ty.shape[2]), dtype)
        function = rows.norm_heads(described, shapes, spans, norm == "layer", eps)
        return call(function, "norm_heads", [qkv, *given], list(qkv.ty.shape), dtype)

    def rope(qkv: Expr, positions: Expr, frequencies: Frequencies, heads: tuple[int, int], rotary: Rotary) -> Expr:
        function = rows.rope(rows.Heads(*heads, int(qkv.ty.shape[2]), dtype), rotary)
        return call(function, "rope", [qkv, positions, relax.const(frequencies)], list(qkv.ty.shape), dtype)

    def softmax(logits: Expr, temperature: Expr) -> Expr:
        return call(rows.softmax(), "softmax", [logits, temperature], list(logits.ty.shape), "float32")

    def choose_experts(logits: Expr, count: int, normalised: bool, scale: float) -> tuple[Expr, Expr]:
        n, number = logits.ty.shape
        function = experts.choose(int(number), count, normalised, scale)
        results = [([n, count], "int32"), ([n, count], "float32")]
        chosen, share = emit.call_all(builder, function, "choose_experts", [logits], results)
        return chosen, share

    def expert_linear(x: Expr, chosen: Expr, weight: Weight) -> Expr:
        (n, count), (rows_of_x, in_features) = chosen.ty.shape, x.ty.shape
        each = not sym.Analyzer().can_prove_equal(rows_of_x, n)
        function = experts.linear(
            *(format_of(weight.packing), _parts(weight), int(weight.rows), int(in_features), int(count), each),
        )
        return call(function, "experts", [x, chosen, *weight.parts.values()], [n * count, weight.rows], COMPUTE)

    def weighted_sum(x: Expr, share: Expr) -> Expr:
        n, count = share.ty.shape
        width = x.ty.shape[1]
        return call(experts.weighted_sum(int(count), int(width)), "weighted_sum", [x, share], [n, width], COMPUTE)

    return Operations(
        *(COMPUTE, multiply, embedding, rms_norm, layer_norm, gated, activation, norm_heads, rope, softmax),
        *(choose_experts, expert_linear, weighted_sum),
    )


def _parts(weight: Weight) -> tuple[linear.Part, ...]:
    return tuple(
        (tuple(emit.size(each) for each in part.ty.shape), str(part.ty.dtype)) for part in weight.parts.values()
    )
