"""Mixtures of experts on the CPU: TIR functions around kernels/experts.c, and the products of kernels/linear.c.

A product of experts packs the rows that chose the same expert together and then multiplies them as any other matrix
product, so that each expert's weights are read once, and those of experts that nobody chose are not.
"""

from __future__ import annotations

import functools
from math import prod
from typing import Any

from tvm import DataType, tirx

from mlcbuild.compiler.cpu import calls
from mlcbuild.compiler.cpu.formats import Format
from mlcbuild.compiler.cpu.linear import PACK_TOKENS, PARTS, TASK_ROWS, Part, wide


@functools.cache
def choose(experts: int, count: int, normalised: bool, scale: float) -> Any:
    """logits [n, experts] float32 -> chosen [n, count] int32, share [n, count] float32."""
    outputs = [(("n", count), "int32"), (("n", count), "float32")]
    rest = (experts, count, calls.Flag(normalised), tirx.const(scale, "float32"))
    return calls.by_row("choose_experts", "mlcbuild_choose_experts", [(("n", experts), "float32")], outputs, *rest)


@functools.cache
def linear(form: Format, parts: tuple[Part, ...], rows: int, in_features: int, count: int, each: bool) -> Any:
    """x, chosen [n, count], the parts of w [experts, rows, in_features] -> [n * count, rows] float32.

    x is float32 [n, in_features]; with `each`, it has a row of its own for every choice: [n * count, in_features].
    """
    experts = int(parts[0][0][0])
    stride = -(-in_features // form.padded_to) * form.padded_to
    pack, multiply = f"mlcbuild_{form.name}_pack_experts", f"mlcbuild_{form.name}_multiply_experts"
    missing = PARTS - len(parts)
    sizes = [_bytes(shape[1:], dtype) for shape, dtype in parts] + [0] * missing
    tasks = -(-rows // TASK_ROWS)

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        (x, chosen, *weights), (y,) = inputs, outputs
        pairs = symbols["n"] * count
        packed, plan = calls.scratch(pairs * stride), calls.scratch(plan_size(pairs, experts), "int32")
        calls.call("mlcbuild_plan_experts", chosen, plan, pairs, experts, 1 if each else count)
        # As 32 bits, which calls.call widens. As 64, TVM would see that 32 do, and hand them over after that.
        active, stretches = plan[0], plan[1]
        calls.for_each(
            stretches,
            lambda task: calls.call(pack, x, wide("float32"), plan, packed, pairs, experts, in_features, stride, task),
            calls.SERIAL,
        )
        calls.for_each(
            active * tasks,
            lambda task: calls.call(
                *(multiply, packed, plan, *weights, *[None] * missing, *sizes, y),
                *(pairs, experts, rows, in_features, stride, task),
            ),
        )

    return calls.function(
        "experts",
        [(("pairs" if each else "n", in_features), "float32"), (("n", count), "int32"), *parts],
        [(("pairs", rows), "float32")],
        body,
    )


@functools.cache
def weighted_sum(count: int, width: int) -> Any:
    """x [n * count, width], share [n, count] -> each token's rows times their shares, added: [n, width], float32."""
    inputs = [(("pairs", width), "float32"), (("n", count), "float32")]
    return calls.by_row("weighted_sum", "mlcbuild_weighted_sum", inputs, [(("n", width), "float32")], count, width)


def plan_size(pairs: Any, experts: int) -> Any:
    """int32 numbers of a plan: experts.h says which."""
    return 3 + 2 * experts + 2 * (pairs // PACK_TOKENS + experts) + 2 * pairs


def _bytes(shape: tuple[int | str, ...], dtype: str) -> int:
    size: int = DataType(dtype).itemsize
    return size * prod(int(extent) for extent in shape)
