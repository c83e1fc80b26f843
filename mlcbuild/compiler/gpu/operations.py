"""The decoder's kernels on a GPU.

Activations are of the model dtype, or float32 where layers keep a state; sums are float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import relax

from mlcbuild.compiler.gpu import expert_plan, experts, products, rows, softmax
from mlcbuild.compiler.gpu.device import Device
from mlcbuild.compiler.gpu.rope import rope
from mlcbuild.compiler.operations import Factories, call, call_all, parts_of, rows_of
from mlcbuild.models.operations import Expr
from mlcbuild.models.weights import Weight


def factories(dtype: str, device: Device, wide: bool = False) -> Factories:
    """`dtype` is the model dtype; with `wide`, activations are float32 between operations, whatever it is."""
    compute = "float32" if wide else dtype

    def linear(weight: Weight, columns: int, x_dtype: str, out_dtype: str) -> Any:
        tiles = device.kind == "metal"
        return products.linear(*_stored(weight), rows_of(weight), columns, x_dtype, out_dtype, tiles)

    def expert_linear(weight: Weight, columns: int, count: int, each: bool) -> Any:
        return experts.linear(*_stored(weight), int(weight.rows), columns, count, each, dtype, compute, device)

    return Factories(
        compute=compute,
        operand=dtype,
        linear=linear,
        embedding=lambda weight, columns: products.embedding(*_stored(weight), columns, dtype),
        rms_norm=partial(rows.rms_norm, dtype=compute, stored=dtype),
        layer_norm=lambda width, eps, weight, bias: rows.layer_norm(width, eps, compute, weight, bias, dtype),
        gated=partial(rows.gated, dtype=compute),
        activation=partial(rows.activation, dtype=compute),
        norm_heads=partial(rows.norm_heads, dtype=dtype),
        rope=lambda heads, dim, rotary: rope(*heads, dim, rotary, dtype),
        choose_experts=experts.choose,
        plan_experts=expert_plan.emit,
        expert_linear=expert_linear,
        weighted_sum=partial(experts.weighted_sum, dtype=compute),
        softmax=partial(_softmax, threads=device.threads),
    )


def _stored(weight: Weight) -> tuple[Any, ...]:
    return parts_of(weight), weight.packing


def _softmax(builder: relax.BlockBuilder, logits: Expr, temperature: Expr, threads: int) -> Expr:
    b, v = logits.ty.shape
    figures, probabilities = softmax.chunk_figures(threads), softmax.probabilities(threads)
    chunks = [([b, (v + softmax.CHUNK - 1) // softmax.CHUNK], "float32")] * 2
    sums, maxima = call_all(builder, figures, "softmax_chunk_figures", [logits, temperature], chunks)
    arguments = [logits, temperature, sums, maxima]
    return call(builder, probabilities, "softmax_probabilities", arguments, [b, v], "float32")
