"""Recurrences on the CPU: TIR functions around kernels/recurrent.c, state_space.c, delta.c, mlstm.c and lru.c, and
the table that models with a state take.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tvm import relax, tirx

from mlcbuild.compiler import operations
from mlcbuild.compiler.cpu import calls
from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent.operations import MLSTM_EPS, Recurrence, Scanned

_CHANNELS = 64  # of one task, where a task may have any: a few vectors; CHANNELS in the C sources
_DELTA_CHANNELS = 128  # likewise in delta.c: what is done once for all columns of a head costs a few of them


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

    def convolve(x: Expr, w: Expr, bias: Expr | None, state: Expr, activated: bool) -> tuple[Expr, ...]:
        width, _, taps = (int(size) for size in w.ty.shape)
        inputs = [x, w, *([] if bias is None else [bias]), state]
        shapes = [list(x.ty.shape), list(state.ty.shape)]
        return tuple(call(_convolve(width, taps, bias is not None, activated), "convolve", inputs, shapes))

    def scan(
        x: Expr, step: Expr, step_bias: Expr, rate: Expr, b: Expr, c: Expr, skip: Expr, state: Expr, scanned: Scanned
    ) -> tuple[Expr, ...]:
        inputs = [x, step, step_bias, rate, b, c, skip, state]
        return tuple(call(_scan(scanned), "scan", inputs, [list(x.ty.shape), list(state.ty.shape)]))

    def delta(x: Expr, decay: Expr, beta: Expr, state: Expr, scanned: Scanned) -> tuple[Expr, ...]:
        shapes = [[x.ty.shape[0], scanned.heads * scanned.dim], list(state.ty.shape)]
        return tuple(call(_delta(scanned), "delta", [x, decay, beta, state], shapes))

    def mlstm(x: Expr, gates: Expr, memory: Expr, top: Expr, scanned: Scanned) -> tuple[Expr, ...]:
        shapes = [[x.ty.shape[0], scanned.heads * (scanned.dim + 1)], list(memory.ty.shape), list(top.ty.shape)]
        return tuple(call(_mlstm(scanned), "mlstm", [x, gates, memory, top], shapes))

    def lru_gates(x: Expr, w: Expr, bias: Expr) -> Expr:
        heads, width, _ = (int(size) for size in w.ty.shape)
        return call(_lru_gates(heads, width), "lru_gates", [x, w, bias], [list(x.ty.shape)])[0]

    def lru(x: Expr, decay: Expr, state: Expr) -> tuple[Expr, ...]:
        shapes = [list(x.ty.shape), list(state.ty.shape)]
        return tuple(call(_lru(int(x.ty.shape[1])), "lru", [x, decay, state], shapes))

    return Recurrence(wkv4, wkv, project, convolve, scan, delta, mlstm, lru_gates, lru)


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


@functools.cache
def _convolve(width: int, taps: int, biased: bool, activated: bool) -> Any:
    rows, state = (("n", width), "float32"), (("b", (taps - 1) * width), "float32")
    bias = [((width,), "float32")] if biased else []

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        x, w, *bias, before = inputs
        tokens = symbols["n"] // symbols["b"]
        calls.for_each(
            symbols["b"] * ((width + _CHANNELS - 1) // _CHANNELS),
            lambda task: calls.call(
                "mlcbuild_convolve",
                x,
                w,
                *(bias or [None]),
                before,
                *outputs,
                tokens,
                width,
                taps,
                task,
                calls.Flag(activated),
            ),
        )

    return calls.function("convolve", [rows, ((width, 1, taps), "float32"), *bias, state], [rows, state], body)


@functools.cache
def _scan(s: Scanned) -> Any:
    width, block = s.heads * s.dim, _CHANNELS if s.each else s.dim
    rows, state, steps = (("n", width), "float32"), (("b", s.size * width), "float32"), (("n", s.heads), "float32")
    per_head, inner = ((s.heads,), "float32"), (("n", s.groups * s.size), "float32")
    limits = [tirx.const(limit, "float32") for limit in s.limits]

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        sizes = (symbols["n"] // symbols["b"], s.heads, s.dim, s.groups, s.size, int(s.each), block)
        calls.for_each(
            symbols["b"] * ((width + block - 1) // block),
            lambda task: calls.call("mlcbuild_scan", *inputs, *outputs, *sizes, task, *limits),
        )

    rate = ((s.size, s.heads), "float32") if s.each else per_head
    return calls.function("scan", [rows, steps, per_head, rate, inner, inner, per_head, state], [rows, state], body)


@functools.cache
def _delta(s: Scanned) -> Any:
    width, each = s.heads * s.dim, s.size if s.each else 1

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        sizes = (symbols["n"] // symbols["b"], s.heads, s.dim, s.groups, s.size, each)
        calls.for_each(
            symbols["b"] * s.heads * ((s.dim + _DELTA_CHANNELS - 1) // _DELTA_CHANNELS),
            lambda task: calls.call("mlcbuild_delta", *inputs, *outputs, *sizes, task),
        )

    shapes = ("n", 2 * s.groups * s.size + width), ("n", s.heads * each), ("n", s.heads), ("b", s.size * width)
    inputs = [(shape, "float32") for shape in shapes]
    return calls.function("delta", inputs, [(("n", width), "float32"), inputs[-1]], body)


@functools.cache
def _mlstm(s: Scanned) -> Any:
    columns = s.dim + 1
    rows = ("n", s.heads * (2 * s.size + s.dim)), ("n", 2 * s.heads), ("b", s.heads * s.size * columns), ("b", s.heads)
    inputs = [(shape, "float32") for shape in rows]

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        sizes = (symbols["n"] // symbols["b"], s.heads, s.dim, s.size)
        calls.for_each(
            symbols["b"] * s.heads * ((columns + _CHANNELS - 1) // _CHANNELS),
            lambda task: calls.call(
                "mlcbuild_mlstm", *inputs, *outputs, *sizes, task, tirx.const(MLSTM_EPS, "float32")
            ),
        )

    return calls.function("mlstm", inputs, [(("n", s.heads * columns), "float32"), *inputs[2:]], body)


@functools.cache
def _lru_gates(heads: int, width: int) -> Any:
    rows = (("n", heads * width), "float32")

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        calls.for_each(
            symbols["n"] * heads,
            lambda task: calls.call("mlcbuild_lru_gates", *inputs, *outputs, heads, width, task),
        )

    given = [rows, ((heads, width, width), "float32"), ((heads * width,), "float32")]
    return calls.function("lru_gates", given, [rows], body)


@functools.cache
def _lru(width: int) -> Any:
    rows, state = (("n", width), "float32"), (("b", width), "float32")

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        calls.for_each(
            symbols["b"] * ((width + _CHANNELS - 1) // _CHANNELS),
            lambda task: calls.call("mlcbuild_lru", *inputs, *outputs, symbols["n"] // symbols["b"], width, task),
        )

    return calls.function("lru", [rows, rows, state], [rows, state], body)
