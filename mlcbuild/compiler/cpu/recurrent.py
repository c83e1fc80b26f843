"""Recurrences on the CPU: TIR functions around kernels/recurrent.c, and the table that recurrent models take."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tvm import relax, tirx

from mlcbuild.compiler import operations
from mlcbuild.compiler.cpu import calls
from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent.operations import Recurrence

_CHANNELS = 64  # of one task of wkv4: a few vectors


def recurrence(builder: relax.BlockBuilder, dtype: str) -> Recurrence:
    """Operations that emit into `builder`; `dtype` is the model dtype."""

    def call(function: Any, name: str, arguments: Sequence[Expr], shapes: Sequence[Sequence[Expr]]) -> list[Expr]:
        return operations.call_all(builder, function, name, arguments, [(shape, "float32") for shape in shapes])

    def wkv4(key: Expr, value: Expr, decay: Expr, bonus: Expr, state: Sequence[Expr]) -> tuple[Expr, ...]:
        shape, states = list(key.ty.shape), [list(each.ty.shape) for each in state]
        inputs = [key, value, decay, bonus, *state]
        return tuple(call(_wkv4(int(shape[1])), "wkv4", inputs, [shape, *states]))

    def wkv(r: Expr, k: Expr, v: Expr, decay: Expr, bonus: Expr, state: Expr, heads: int) -> tuple[Expr, ...]:
        varies = not _is_one(decay.ty.shape[0])
        function = _wkv(heads, int(r.ty.shape[1]) // heads, varies)
        return tuple(call(function, "wkv", [r, k, v, decay, bonus, state], [list(r.ty.shape), list(state.ty.shape)]))

    def project(x: Expr, w: Expr) -> Expr:
        groups, depth, width = (int(size) for size in w.ty.shape)
        shape = [groups, x.ty.shape[0], width]
        return call(_project(groups, depth, width, dtype), "project", [x, w], [shape])[0]

    return Recurrence(wkv4, wkv, project)


def _is_one(size: Any) -> bool:
    return isinstance(size, tirx.IntImm) and int(size) == 1


@functools.cache
def _wkv4(width: int) -> Any:
    rows, state = (("n", width), "float32"), (("b", width), "float32")

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        tokens = symbols["n"] // symbols["b"]
        calls.for_each(
            symbols["b"] * ((width + _CHANNELS - 1) // _CHANNELS),
            lambda task: calls.call("mlcbuild_wkv4", *inputs, *outputs, tokens, width, _CHANNELS, task),
        )

    weights = [((width,), "float32")] * 2
    return calls.function("wkv4", [rows, rows, *weights, state, state, state], [rows, state, state, state], body)


@functools.cache
def _wkv(heads: int, dim: int, varies: bool) -> Any:
    """`varies`: every token has a decay of its own."""
    width = heads * dim
    rows, state = (("n", width), "float32"), (("b", width * dim), "float32")

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        tokens = symbols["n"] // symbols["b"]
        calls.for_each(
            symbols["b"] * heads,
            lambda task: calls.call(
                "mlcbuild_wkv", *inputs, *outputs, tokens, heads, dim, width if varies else 0, task
            ),
        )

    decay = (("n" if varies else 1, width), "float32")
    return calls.function("wkv", [rows, rows, rows, decay, ((width,), "float32"), state], [rows, state], body)


@functools.cache
def _project(groups: int, depth: int, width: int, dtype: str) -> Any:
    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        n = symbols["n"]
        calls.for_each(
            n * groups, lambda task: calls.call("mlcbuild_project", *inputs, *outputs, n, groups, depth, width, task)
        )

    inputs = [(("n", groups * depth), "float32"), ((groups, depth, width), dtype)]
    return calls.function("project", inputs, [((groups, "n", width), "float32")], body)
