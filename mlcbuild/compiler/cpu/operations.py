"""The decoder's operations on the CPU."""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx

from mlcbuild.compiler.cpu import linear, rows
from mlcbuild.models.operations import Expr, Operations, Weight
from mlcbuild.recipes.types import Weights

COMPUTE = "float32"  # every kernel computes in it, so rounding activations to float16 in between would only lose


def operations(builder: relax.BlockBuilder, weights: Weights | None, dtype: str) -> Operations:
    """Operations that emit into `builder`, on weights of the format `weights` whose model dtype is `dtype`."""

    def call(function: Any, name: str, arguments: list[Expr], shape: list[Expr], out_dtype: str) -> Expr:
        kernel = builder.add_func(function, name)
        return builder.emit(relax.call_tir(kernel, arguments, out_ty=relax.TensorType(shape, out_dtype)))

    def multiply(x: Expr, weight: Weight, out_dtype: str) -> Expr:
        n, in_features = x.ty.shape
        columns = int(in_features)
        if "weight" in weight:
            function = linear.dense(columns, str(x.ty.dtype), dtype, out_dtype)
            arguments = [x, weight["weight"]]
        else:
            assert weights is not None
            function = linear.group_quantized(
                columns, weights.bits, weights.group_size, str(x.ty.dtype), dtype, out_dtype
            )
            arguments = [x, weight["q_weight"], weight["q_scale"]]
        return call(function, "linear", arguments, [n, arguments[1].ty.shape[0]], out_dtype)

    def embedding(ids: Expr, weight: Weight, hidden_size: int) -> Expr:
        if "weight" in weight:
            return builder.emit_te(_take, weight["weight"], ids, primfunc_name_hint="embedding")
        assert weights is not None
        return builder.emit_te(
            _take_quantized, weight["q_weight"], weight["q_scale"], ids, hidden_size, weights.bits, weights.group_size,
            primfunc_name_hint="embedding",
        )  # fmt: skip

    def rms_norm(x: Expr, weight: Expr, eps: float) -> Expr:
        return call(rows.rms_norm(int(x.ty.shape[1]), eps, dtype), "rms_norm", [x, weight], list(x.ty.shape), COMPUTE)

    def gated(x: Expr, activation: str) -> Expr:
        width = int(x.ty.shape[1]) // 2
        return call(rows.gated(activation, width), "gated", [x], [x.ty.shape[0], width], COMPUTE)

    def softmax(logits: Expr, temperature: Expr) -> Expr:
        return call(rows.softmax(), "softmax", [logits, temperature], list(logits.ty.shape), "float32")

    return Operations(COMPUTE, multiply, embedding, rms_norm, gated, softmax)


def _take(weight: te.Tensor, ids: te.Tensor) -> te.Tensor:
    return te.compute((ids.shape[0], weight.shape[1]), lambda i, k: weight[ids[i], k], name="embedding")


def _take_quantized(
    words: te.Tensor, scale: te.Tensor, ids: te.Tensor, hidden_size: int, bits: int, group_size: int
) -> te.Tensor:
    """Rows of `words` [V, W] uint32 by `ids`, dequantized: (q - zero) * scale (docs/quantization.md)."""
    per_word, mask, zero = 32 // bits, (1 << bits) - 1, (1 << (bits - 1)) - 1

    def value(i: Any, k: Any) -> Any:
        shift = tirx.Cast("uint32", (k % per_word) * bits)
        q = tirx.bitwise_and(tirx.shift_right(words[ids[i], k // per_word], shift), tirx.const(mask, "uint32"))
        centred = tirx.Cast("int32", q) - tirx.const(zero, "int32")
        return tirx.Cast(scale.dtype, centred) * scale[ids[i], k // group_size]

    return te.compute((ids.shape[0], hidden_size), value, name="embedding")
