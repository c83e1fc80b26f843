"""The decoder's kernels on the CPU. They compute in float32: rounding activations in between would only lose."""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import relax

from mlcbuild.compiler.cpu import experts, linear, rows
from mlcbuild.compiler.cpu.formats import format_of
from mlcbuild.compiler.operations import Factories, call, parts_of, rows_of
from mlcbuild.models.operations import Expr
from mlcbuild.models.weights import Weight


def factories(dtype: str) -> Factories:
    """`dtype` is the model dtype."""

    def multiply(weight: Weight, columns: int, x_dtype: str, out_dtype: str) -> Any:
        return linear.linear(*_stored(weight), rows_of(weight), columns, x_dtype, out_dtype)

    def expert_linear(weight: Weight, columns: int, count: int, each: bool) -> Any:
        return experts.linear(*_stored(weight), int(weight.rows), columns, count, each)

    def fused(heads: tuple[int, int], dim: int) -> rows.Heads:
        return rows.Heads(*heads, dim, dtype)

    return Factories(
        compute="float32",
        operand=None,
        linear=multiply,
        embedding=lambda weight, columns: linear.embedding(*_stored(weight), columns, dtype),
        rms_norm=partial(rows.rms_norm, dtype=dtype),
        layer_norm=lambda width, eps, weight, bias: rows.layer_norm(width, eps, dtype, weight, bias),
        gated=rows.gated,
        activation=rows.activation,
        norm_heads=lambda heads, dim, *rest: rows.norm_heads(fused(heads, dim), *rest),
        rope=lambda heads, dim, rotary: rows.rope(fused(heads, dim), rotary),
        choose_experts=experts.choose,
        plan_experts=lambda *_: [],
        expert_linear=expert_linear,
        weighted_sum=experts.weighted_sum,
        softmax=_softmax,
    )


def _stored(weight: Weight) -> tuple[Any, ...]:
    """A weight's format, and the shapes and dtypes of its parts."""
    return format_of(weight.packing), tuple((shape, dtype) for _, shape, dtype in parts_of(weight))


def _softmax(builder: relax.BlockBuilder, logits: Expr, temperature: Expr) -> Expr:
    return call(builder, rows.softmax(), "softmax", [logits, temperature], list(logits.ty.shape), "float32")
