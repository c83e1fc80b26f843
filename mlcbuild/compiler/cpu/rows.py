"""Row-wise operations on the CPU: TIR functions that give rows to the kernels of kernels/rows.c."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from mlcbuild.compiler.cpu import calls
from mlcbuild.models.rope import Rotary


@functools.cache
def rms_norm(width: int, eps: float, dtype: str) -> Any:
    """x [n, width] float32, w [width] dtype -> [n, width] float32."""
    rows = _rows(width)
    epsilon = tirx.const(eps, "float32")
    return calls.by_row("norm", "mlcbuild_rms_norm", [rows, ((width,), dtype)], [rows], width, epsilon)


@functools.cache
def layer_norm(width: int, eps: float, dtype: str, weight: bool, bias: bool) -> Any:
    """x [n, width] float32, then w and b [width] dtype as far as there are any -> [n, width] float32."""
    rows = _rows(width)
    vectors = [((width,), dtype) if present else None for present in (weight, bias)]
    epsilon = tirx.const(eps, "float32")
    return calls.by_row("layer_norm", "mlcbuild_layer_norm", [rows, *vectors], [rows], width, epsilon)


@functools.cache
def gated(activation: str, width: int) -> Any:
    """[gate | up] [n, 2 * width] -> activation(gate) * up [n, width], float32."""
    return calls.by_row("gate", f"mlcbuild_gated_{activation}", [_rows(2 * width)], [_rows(width)], width)


@functools.cache
def activation(name: str, width: int) -> Any:
    """x [n, width] -> activation(x) [n, width], float32."""
    return calls.by_row("activation", f"mlcbuild_activation_{name}", [_rows(width)], [_rows(width)], width)


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
    parts = [heads.array(count) for count in (heads.heads, heads.kv_heads, heads.kv_heads)]
    arrays = [heads.fused, (("n",), "int32"), *parts, _table(rotary)]
    return calls.by_row("split_rotary", "mlcbuild_rope", arrays, [], *heads.sizes, *_arguments(rotary))


@functools.cache
def rope(heads: Heads, rotary: Rotary) -> Any:
    """Fused heads, positions [n] and the table of frequencies -> the same heads, queries and keys turned."""
    given = [heads.fused, (("n",), "int32"), _table(rotary)]
    rest = (*heads.sizes, *_arguments(rotary))
    return calls.by_row("rope", "mlcbuild_rope_fused", given, [heads.fused], *rest)


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
    given = [None if shape is None else (shape, heads.dtype) for shape in weights]
    return calls.by_row("norm_heads", "mlcbuild_norm_heads", [heads.fused, *given], [heads.fused], *rest)


def _rows(width: int) -> tuple[calls.Shape, str]:
    return ("n", width), "float32"


def _table(rotary: Rotary) -> tuple[calls.Shape, str]:
    """The frequencies; where nothing is turned, a number that is not read."""
    return (max(rotary.dim // 2, 1),), "float32"


def _arguments(rotary: Rotary) -> tuple[Any, ...]:
    return rotary.dim, calls.Flag(rotary.neighbours), tirx.const(rotary.factor, "float32")
