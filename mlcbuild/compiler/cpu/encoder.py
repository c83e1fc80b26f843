"""Attention of encoders on the CPU: a TIR function around `mlcbuild_attention_masked` of kernels/attention.c."""

from __future__ import annotations

import functools
from typing import Any

from tvm import relax, tirx

from mlcbuild.compiler import operations
from mlcbuild.compiler.cpu import calls
from mlcbuild.compiler.cpu.attention import QUERIES
from mlcbuild.models.encoder import Attend
from mlcbuild.models.operations import Expr


def attend(builder: relax.BlockBuilder, dtype: str) -> Attend:
    """What mlcbuild.models.encoder calls so, emitted into `builder`; `dtype` is the model dtype."""

    def masked(qkv: Expr, mask: Expr, bias: Expr | None, heads: int) -> Expr:
        width = int(qkv.ty.shape[1]) // 3
        function = _masked(heads, width // heads, dtype, 0 if bias is None else int(bias.ty.shape[1]))
        given = [qkv, mask] if bias is None else [qkv, mask, bias]
        return operations.call(builder, function, "attention", given, [qkv.ty.shape[0], width], dtype)

    return masked


@functools.cache
def _masked(heads: int, dim: int, dtype: str, distances: int) -> Any:
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
