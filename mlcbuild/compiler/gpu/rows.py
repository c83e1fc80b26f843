"""Row-wise operations on GPUs, as TIR functions that are not scheduled yet. Arithmetic is float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from mlcbuild.errors import MlcBuildError

NORM, GATE = "mlcbuild.norm", "mlcbuild.gate"  # attributes of functions: of rms_norm its eps, of gated its width
BLOCKS = {NORM: {"squares", "normed"}, GATE: {"gate"}}  # of such a function; with others it does more


@functools.cache
def rms_norm(width: int, eps: float, dtype: str, stored: str | None = None) -> Any:
    """x [n, width], w [width] -> x / sqrt(mean(x²) + eps) * w [n, width]; w may be `stored` in another dtype."""
    x = te.placeholder((tirx.Var("n", "int64"), int64(width)), dtype, "x")
    w = te.placeholder((int64(width),), stored or dtype, "w")
    k = te.reduce_axis((int64(0), int64(width)), "k")
    squares = te.compute((x.shape[0],), lambda i: te.sum(widened(x[i, k]) * widened(x[i, k]), axis=k), name="squares")

    def normed(i: Any, j: Any) -> Any:
        mean = squares[i] * tirx.const(1.0 / width, "float32")
        return (widened(x[i, j]) * tirx.rsqrt(mean + tirx.const(eps, "float32")) * widened(w[j])).astype(dtype)

    return private([x, w, te.compute(x.shape, normed, name="normed")]).with_attr(NORM, eps)


@functools.cache
def layer_norm(width: int, eps: float, dtype: str, scaled: bool, shifted: bool, stored: str | None = None) -> Any:
    """x [n, width], w [width] if `scaled`, b [width] if `shifted` -> (x - mean) / sqrt(variance + eps) * w + b.

    w and b may be `stored` in another dtype than x and the result.
    """
    x = te.placeholder((tirx.Var("n", "int64"), int64(width)), dtype, "x")
    w, b = (te.placeholder((int64(width),), stored or dtype, name) for name in ("w", "b"))
    k, m = (te.reduce_axis((int64(0), int64(width)), name) for name in ("k", "m"))
    part = tirx.const(1.0 / width, "float32")
    mean = te.compute((x.shape[0],), lambda i: te.sum(widened(x[i, k]) * part, axis=k), name="mean")

    def square(i: Any, j: Any) -> Any:
        return (widened(x[i, j]) - mean[i]) * (widened(x[i, j]) - mean[i])

    variance = te.compute((x.shape[0],), lambda i: te.sum(square(i, m) * part, axis=m), name="variance")

    def normed(i: Any, j: Any) -> Any:
        value = (widened(x[i, j]) - mean[i]) * tirx.rsqrt(variance[i] + tirx.const(eps, "float32"))
        value = value * widened(w[j]) if scaled else value
        return (value + widened(b[j]) if shifted else value).astype(dtype)

    given = [tensor for tensor, present in ((w, scaled), (b, shifted)) if present]
    return private([x, *given, te.compute(x.shape, normed, name="normed")])


@functools.cache
def norm_heads(
    heads: tuple[int, int], dim: int, weights: tuple[tuple[int, ...] | None, ...], spans: str, centred: bool,
    eps: float, dtype: str,
) -> Any:  # fmt: skip
    """Fused heads [n, heads + 2 * kv_heads, dim], the weights of queries and of keys, their biases or None -> the same
    heads, the first two normed.

    spans: head (one weight [dim] for all heads), per_head (a weight [dim] for each), all (all heads as one).
    """
    n, width, both = tirx.Var("n", "int64"), int64(dim), sum(heads)
    qkv = te.placeholder((n, int64(both + heads[1]), width), dtype, "qkv")
    names = ("q_norm", "k_norm", "q_norm_bias", "k_norm_bias")
    vectors: list[Any] = [
        None if shape is None else te.placeholder(tuple(map(int64, shape)), dtype, name)
        for shape, name in zip(weights, names, strict=True)
    ]

    def mean(name: str, start: int, count: int, value: Callable[[Any, Any, Any], Any]) -> te.Tensor:
        """The mean of `value` over each head, or over `count` of them from `start` on: [n, heads] or [n, 1]."""
        k = te.reduce_axis((int64(0), width), "k")
        if spans != "all":
            part = float32(1 / dim)
            return te.compute((n, int64(count)), lambda i, h: te.sum(value(i, h + start, k) * part, axis=k), name=name)
        m, part = te.reduce_axis((int64(0), int64(count)), "m"), float32(1 / (dim * count))
        return te.compute((n, int64(1)), lambda i, _: te.sum(value(i, m + start, k) * part, axis=[m, k]), name=name)

    def statistics(start: int, count: int) -> tuple[Callable[[Any, Any], Any], te.Tensor]:
        """What is subtracted from (token, head of these), and the mean of the squares of what is left."""

        def at(table: te.Tensor, i: Any, h: Any) -> Any:
            return table[i, 0 if spans == "all" else h]

        middle = mean("middle", start, count, lambda i, h, k: widened(qkv[i, h, k])) if centred else None

        def off(i: Any, h: Any) -> Any:
            return float32(0) if middle is None else at(middle, i, h)

        def square(i: Any, h: Any, k: Any) -> Any:
            value = widened(qkv[i, h, k]) - off(i, h - start)
            return value * value

        return off, mean("squares", start, count, square)

    starts = (0, heads[0])
    found = [statistics(start, count) for start, count in zip(starts, heads, strict=True)]

    def normed(i: Any, h: Any, d: Any, index: int) -> Any:
        off, squares = found[index]
        head = h - starts[index]
        scale = tirx.rsqrt(squares[i, 0 if spans == "all" else head] + float32(eps))
        place = {"head": (d,), "per_head": (head, d), "all": (head * width + d,)}[spans]
        weight, bias = vectors[index], vectors[index + 2]
        value = (widened(qkv[i, h, d]) - off(i, head)) * scale * widened(weight[place])
        return (value if bias is None else value + widened(bias[place])).astype(dtype)

    def value(i: Any, h: Any, d: Any) -> Any:
        rest = tirx.if_then_else(h < both, normed(i, h, d, 1), qkv[i, h, d])
        return tirx.if_then_else(h < heads[0], normed(i, h, d, 0), rest)

    given = [each for each in vectors if each is not None]
    return private([qkv, *given, te.compute(qkv.shape, value, name="normed_heads")])


@functools.cache
def gated(activation: str, width: int, dtype: str) -> Any:
    """[gate | up] [n, 2 * width] -> activation(gate) * up [n, width]. Raises MlcBuildError for an unknown one."""
    function = activation_of(activation)
    x = te.placeholder((tirx.Var("n", "int64"), int64(2 * width)), dtype, "x")
    result = te.compute(
        (x.shape[0], int64(width)),
        lambda i, j: (function(widened(x[i, j])) * widened(x[i, j + width])).astype(dtype),
        name="gate",
    )
    return private([x, result]).with_attr(GATE, width)


@functools.cache
def activation(name: str, width: int, dtype: str) -> Any:
    """x [n, width] -> activation(x) [n, width]. Raises MlcBuildError for an unknown activation."""
    function = activation_of(name)
    x = te.placeholder((tirx.Var("n", "int64"), int64(width)), dtype, "x")
    return private([x, te.compute(x.shape, lambda i, j: function(widened(x[i, j])).astype(dtype), name="activated")])


def activation_of(name: str) -> Callable[[Any], Any]:
    """The activation function of a decoder by its name, on float32 expressions."""
    if name not in _ACTIVATIONS:
        raise MlcBuildError(f"activation {name}: GPU libraries have {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def private(tensors: list[te.Tensor]) -> Any:
    """The function of these inputs and this output, without a symbol of its own."""
    return te.create_prim_func(tensors).without_attr("global_symbol")


def int64(size: int) -> Any:
    """A constant dimension; relax's are int64, and a function fuses with others only if its own are too."""
    return tirx.IntImm("int64", size)


def widened(value: Any) -> Any:
    return value.astype("float32")


def float32(value: float) -> Any:
    return tirx.const(value, "float32")


def _silu(x: Any) -> Any:
    return x / (float32(1) + tirx.exp(-x))


def _relu(x: Any) -> Any:
    return tirx.max(x, float32(0))


def _relu2(x: Any) -> Any:
    return _relu(x) * _relu(x)


def _gelu(x: Any) -> Any:
    """x / 2 * (1 + erf(x / sqrt(2))). WGSL has no erf: Abramowitz and Stegun 7.1.26, off by 1.5e-7 at most."""
    z = tirx.abs(x) * float32(math.sqrt(0.5))
    t = float32(1) / (float32(1) + float32(0.3275911) * z)
    polynomial = float32(0)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial = (polynomial + float32(factor)) * t
    erf = float32(1) - polynomial * tirx.exp(-z * z)
    return float32(0.5) * x * (float32(1) + tirx.if_then_else(x < float32(0), -erf, erf))


def _gelu_tanh(x: Any) -> Any:
    """x / 2 * (1 + tanh(u)), with 1 + tanh(u) = 2 / (1 + exp(-2 u)), which does not overflow into NaN."""
    u = float32(math.sqrt(2 / math.pi)) * (x + float32(0.044715) * x * x * x)
    return x / (float32(1) + tirx.exp(float32(-2) * u))


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
}
