"""Matrix products and embedding lookups on the CPU: TIR functions around kernels/linear.c."""

from __future__ import annotations

import functools
from typing import Any

from mlcbuild.compiler.cpu import calls
from mlcbuild.compiler.cpu.formats import Format

TASK_ROWS = 32  # weight rows of one task; likewise in linear.c
PACK_TOKENS = 24  # activation rows that one task packs; likewise in experts.h
PARTS = 5  # tensors that a kernel takes for one matrix, at most

Part = tuple[tuple[int | str, ...], str]  # shape, its symbolic dimensions by name, and dtype


@functools.cache
def linear(
    form: Format, parts: tuple[Part, ...], rows: int | str, in_features: int, x_dtype: str, out_dtype: str
) -> Any:
    """x [n, in_features], the parts of w [rows, in_features] -> x · wᵀ [n, rows], as a PrimFunc with symbolic n."""
    stride = -(-in_features // form.padded_to) * form.padded_to
    pack, multiply = f"mlcbuild_{form.name}_pack", f"mlcbuild_{form.name}_multiply"
    missing = [None] * (PARTS - len(parts))

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        (x, *weights), (y,) = inputs, outputs
        n, out_features = symbols["n"], y.shape[1]
        packed = calls.scratch(n * stride)
        calls.for_each(
            (n + PACK_TOKENS - 1) // PACK_TOKENS,
            lambda task: calls.call(pack, x, wide(x_dtype), packed, n, in_features, stride, task),
        )
        calls.for_each(
            (out_features + TASK_ROWS - 1) // TASK_ROWS,
            lambda task: calls.call(
                *(multiply, packed, *weights, *missing, y, wide(out_dtype)),
                *(n, out_features, in_features, stride, task),
            ),
        )

    return calls.function("linear", [(("n", in_features), x_dtype), *parts], [(("n", rows), out_dtype)], body)


@functools.cache
def embedding(form: Format, parts: tuple[Part, ...], hidden_size: int, dtype: str) -> Any:
    """ids int32 [n], the parts of w [V, hidden_size] -> rows of w [n, hidden_size] of the model dtype."""
    kernel = f"mlcbuild_{form.name}_embed"

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        (ids, *weights), (y,) = inputs, outputs
        second = weights[1] if len(weights) > 1 else None
        calls.for_each(
            symbols["n"],
            lambda i: calls.call(kernel, ids, weights[0], second, y, hidden_size, i),
            serial_up_to=4,
        )

    return calls.function("embedding", [(("n",), "int32"), *parts], [(("n", hidden_size), dtype)], body)


def wide(dtype: str) -> Any:
    return calls.Flag(dtype == "float32")
