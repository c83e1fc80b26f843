"""The decoder's operations on a GPU: activations are of the model dtype, sums float32."""

from __future__ import annotations

from functools import partial

from tvm import relax, sym

from mlcbuild.compiler import emit
from mlcbuild.compiler.gpu import experts, products, rows, softmax
from mlcbuild.compiler.gpu import rope as rotary_embedding
from mlcbuild.compiler.gpu.device import Device
from mlcbuild.compiler.gpu.script import quick
from mlcbuild.models.operations import Expr, Operations
from mlcbuild.models.rope import Frequencies, Rotary
from mlcbuild.models.weights import Weight


def operations(builder: relax.BlockBuilder, dtype: str, device: Device) -> Operations:
    """Operations that emit into `builder`; `dtype` is the model dtype."""

    call = partial(emit.call, builder)

    def multiply(x: Expr, weight: Weight, out_dtype: str) -> Expr:
        n, in_features = x.ty.shape
        wide = device.kind == "metal"
        function = products.linear(
            *(_parts(weight), weight.packing, emit.size(weight.rows), int(in_features)),
            *(str(x.ty.dtype), out_dtype, wide),
        )
        return call(function, "linear", [x, *weight.parts.values()], [n, weight.rows], out_dtype)

    def embedding(ids: Expr, weight: Weight, hidden_size: int) -> Expr:
        function = products.embedding(_parts(weight), weight.packing, hidden_size, dtype)
        return call(function, "embedding", [ids, *weight.parts.values()], [ids.ty.shape[0], hidden_size], dtype)

    def rms_norm(x: Expr, weight: Expr, eps: float) -> Expr:
        return call(rows.rms_norm(int(x.ty.shape[1]), eps, dtype), "rms_norm", [x, weight], list(x.ty.shape), dtype)

    def gated(x: Expr, activation: str) -> Expr:
        width = int(x.ty.shape[1]) // 2
        return call(rows.gated(activation, width, dtype), "gated", [x], [x.ty.shape[0], width], dtype)

    def layer_norm(x: Expr, weight: Expr | None, bias: Expr | None, eps: float) -> Expr:
        function = rows.layer_norm(int(x.ty.shape[1]), eps, dtype, weight is not None, bias is not None)
        given = [each for each in (weight, bias) if each is not None]
        return call(function, "layer_norm", [x, *given], list(x.ty.shape), dtype)

    def activation(x: Expr, name: str) -> Expr:
        return call(rows.activation(name, int(x.ty.shape[1]), dtype), "activation", [x], list(x.ty.shape), dtype)

    def norm_heads(
        qkv: Expr, weights: tuple[Expr | None, ...], heads: tuple[int, int], spans: str, norm: str, eps: float
    ) -> Expr:
        shapes = tuple(None if each is None else tuple(int(size) for size in each.ty.shape) for each in weights)
        given = [each for each in weights if each is not None]
        function = rows.norm_heads(heads, int(qkv.ty.shape[2]), shapes, spans, norm == "layer", eps, dtype)
        return call(function, "norm_heads", [qkv, *given], list(qkv.ty.shape), dtype)

    def rope(qkv: Expr, positions: Expr, frequencies: Frequencies, heads: tuple[int, int], rotary: Rotary) -> Expr:
        function = rotary_embedding.rope(*heads, int(qkv.ty.shape[2]), rotary, dtype)
        return call(function, "rope", [qkv, positions, relax.const(frequencies)], list(qkv.ty.shape), dtype)

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
            *(_parts(weight), weight.packing, int(weight.rows), int(in_features), int(count), each, dtype)
        )
        return call(function, "experts", [x, chosen, *weight.parts.values()], [n * count, weight.rows], dtype)

    def weighted_sum(x: Expr, share: Expr) -> Expr:
        (n, count), width = share.ty.shape, x.ty.shape[1]
        return call(experts.weighted_sum(int(count), int(width), dtype), "weighted_sum", [x, share], [n, width], dtype)

    def softmax_with_temperature(logits: Expr, temperature: Expr) -> Expr:
        b, v = logits.ty.shape
        threads = min(256, device.threads)
        with quick():
            figures, probabilities = softmax.chunk_figures(threads), softmax.probabilities(threads)
        chunks = [([b, (v + softmax.CHUNK - 1) // softmax.CHUNK], "float32")] * 2
        sums, maxima = emit.call_all(builder, figures, "softmax_chunk_figures", [logits, temperature], chunks)
        arguments = [logits, temperature, sums, maxima]
        return call(probabilities, "softmax_probabilities", arguments, [b, v], "float32")

    return Operations(
        compute=dtype,
        linear=multiply,
        embedding=embedding,
        rms_norm=rms_norm,
        layer_norm=layer_norm,
        gated=gated,
        activation=activation,
        norm_heads=norm_heads,
        rope=rope,
        choose_experts=choose_experts,
        expert_linear=expert_linear,
        weighted_sum=weighted_sum,
        softmax=softmax_with_temperature,
    )


def _parts(weight: Weight) -> tuple[products.Part, ...]:
    return tuple(
        (name, tuple(emit.size(each) for each in part.ty.shape), str(part.ty.dtype))
        for name, part in weight.parts.items()
    )
