"""Row-wise operations on the CPU: TIR functions that give rows to the kernels of kernels/rows.c."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from mlcbuild.compiler.cpu import calls
from mlcbuild.models.rope import Rotary

_SERIAL = 4  # rows that take less time than waking the other threads


@functools.cache
def rms_norm(width: int, eps: float, dtype: str) -> Any:
    """x [n, width] float32, w [width] dtype -> [n, width] float32."""

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        epsilon = tirx.const(eps, "float32")
        calls.for_each(
            symbols["n"], lambda i: calls.call("mlcbuild_rms_norm", *inputs, *outputs, i, width, epsilon), _SERIAL
        )

    return calls.function("norm", [(("n", width), "float32"), ((width,), dtype)], [(("n", width), "float32")], body)


@functools.cache
def layer_norm(width: int, eps: float, dtype: str, weight: bool, bias: bool) -> Any:
    """x [n, width] float32, then w and b [width] dtype as far as there are any -> [n, width] float32."""

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        x, *given = inputs
        w = given.pop(0) if weight else None
        b = given.pop(0) if bias else None
        epsilon = tirx.const(eps, "float32")
        calls.for_each(
            symbols["n"], lambda i: calls.call("mlcbuild_layer_norm", x, w, b, *outputs, i, width, epsilon), _SERIAL
        )

    vectors = [((width,), dtype)] * (weight + bias)
    rows = (("n", width), "float32")
    return calls.function("layer_norm", [rows, *vectors], [rows], body)


@functools.cache
def gated(activation: str, width: int) -> Any:
    """[gate | up] [n, 2 * width] -> activation(gate) * up [n, width], float32."""

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        kernel = f"mlcbuild_gated_{activation}"
        calls.for_each(symbols["n"], lambda i: calls.call(kernel, *inputs, *outputs, i, width), _SERIAL)

    return calls.function("gate", [(("n", 2 * width), "float32")], [(("n", width), "float32")], body)


@functools.cache
def activation(name: str, width: int) -> Any:
    """x [n, width] -> activation(x) [n, width], float32."""

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        kernel = f"mlcbuild_activation_{name}"
        calls.for_each(symbols["n"], lambda i: calls.call(kernel, *inputs, *outputs, i, width), _SERIAL)

    return calls.function("activation", [(("n", width), "float32")], [(("n", width), "float32")], body)


@functools.cache
def softmax() -> Any:
    """logits [b, V], temperature [b] -> probabilities [b, V], all float32."""

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        width = symbols["width"]
        calls.for_each(symbols["b"], lambda i: calls.call("mlcbuild_softmax", *inputs, *outputs, i, width))

    rows = (("b", "width"), "float32")
    return calls.function("softmax_with_temperature", [rows, (("b",), "float32")], [rows], body)


@dataclass(frozen=True)
class Heads:
    """Fused queries, keys and values of `n` tokens: [n, heads + 2 * kv_heads, dim] in the model dtype."""

    heads: int
    kv_heads: int
    dim: int
    dtype: str

    def array(self, heads: int) -> tuple[calls.Shape, str]:
        return ("n", heads, self.dim), self.dtype

    @property
    def fused(self) -> tuple[calls.Shape, str]:
        return self.array(self.heads + 2 * self.kv_heads)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.heads, self.kv_heads, self.dim


@functools.cache
def split_rotary(heads: Heads, rotary: Rotary) -> Any:
    """Fused heads and positions [n] -> q, k, v, the first two turned; the KV cache calls it with its table."""

    def body(symbols: dict[str, Any], inputs: Any, _: Any) -> None:
        rest = (*heads.sizes, *_arguments(rotary))
        calls.for_each(symbols["n"], lambda i: calls.call("mlcbuild_rope", *inputs, i, *rest), _SERIAL)

    parts = [heads.array(count) for count in (heads.heads, heads.kv_heads, heads.kv_heads)]
    arrays = [heads.fused, (("n",), "int32"), *parts, _table(rotary)]
    return calls.function("split_rotary", arrays, [], body)


@functools.cache
def rope(heads: Heads, rotary: Rotary) -> Any:
    """Fused heads, positions [n] and the table of frequencies -> the same heads, queries and keys turned."""

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        rest = (*heads.sizes, *_arguments(rotary))
        calls.for_each(symbols["n"], lambda i: calls.call("mlcbuild_rope_fused", *inputs, *outputs, i, *rest), _SERIAL)

    return calls.function("rope", [heads.fused, (("n",), "int32"), _table(rotary)], [heads.fused], body)


@functools.cache
def norm_heads(heads: Heads, weights: tuple[calls.Shape | None, ...], spans: str, centred: bool, eps: float) -> Any:
    """Fused heads, the weights of queries and of keys, their biases or None -> the same heads, the first two normed.

    spans: head (one weight [dim] for all heads), per_head (a weight [dim] for each), all (all heads as one).
    """
    rest = (
        *heads.sizes,
        calls.Flag(spans == "all"),
        0 if spans == "head" else heads.dim,
        calls.Flag(centred),
        tirx.const(eps, "float32"),
    )

    def body(symbols: dict[str, Any], inputs: Any, outputs: Any) -> None:
        qkv, *there = inputs
        given = [qkv, *(None if shape is None else there.pop(0) for shape in weights), *outputs]
        calls.for_each(symbols["n"], lambda i: calls.call("mlcbuild_norm_heads", *given, i, *rest), _SERIAL)

    given = [(shape, heads.dtype) for shape in weights if shape is not None]
    return calls.function("norm_heads", [heads.fused, *given], [heads.fused], body)


def _table(rotary: Rotary) -> tuple[calls.Shape, str]:
    """The frequencies; where nothing is turned, a number that is not read."""
    return (max(rotary.dim // 2, 1),), "float32"


def _arguments(rotary: Rotary) -> tuple[Any, ...]:
    return rotary.dim, calls.Flag(rotary.neighbours), tirx.const(rotary.factor, "float32")
