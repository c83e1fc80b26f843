"""Attention of encoders on the CPU: a TIR function around `mlcbuild_attention_masked` of kernels/attention.c."""

from __future__ import annotations

import functools
from typing import Any

from tvm import tirx

from mlcbuild.compiler.cpu import calls
from mlcbuild.compiler.cpu.attention import QUERIES


@functools.cache
def masked(heads: int, dim: int, dtype: str, distances: int) -> Any:
    """qkv [n, 3 * heads * dim], mask int32 [b, s], bias float32 [heads, distances] if any -> [n, heads * dim]."""
    width = heads * dim

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        tokens = symbols["s"]
        scale = tirx.const(dim**-0.5, "float32")
        calls.for_each(
            symbols["b"] * ((tokens + QUERIES - 1) // QUERIES) * heads,
            lambda task: calls.call(
                "mlcbuild_attention_masked",
                *inputs,
                *absent,
                *outputs,
                distances,
                tokens,
                heads,
                dim,
                QUERIES,
                task,
                scale,
            ),
        )

    described: list[tuple[calls.Shape, str]] = [(("n", 3 * width), dtype), (("b", "s"), "int32")]
    described += [((heads, distances), "float32")] if distances else []
    absent = [] if distances else [None]
    return calls.function("attention", described, [(("n", width), dtype)], body)
