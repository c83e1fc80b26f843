"""Row-wise operations on the CPU: TIR functions that give rows to the kernels of kernels/rows.c."""

from __future__ import annotations

import functools
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from mlcbuild.compiler.cpu import calls

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


@functools.cache
def rope(heads: int, kv_heads: int, dim: int, rotary_dim: int, dtype: str) -> Any:
    """Fused heads [n, heads + 2 * kv_heads, dim] and positions [n] -> q, k, v, the first two turned.

    The KV cache calls it; `frequency` [rotary_dim / 2] float32 is the table that it was created with.
    """
    fused = heads + 2 * kv_heads

    @T.prim_func(s_tir=True, private=True)
    def split_rotary(
        var_qkv: T.handle, var_positions: T.handle, var_q: T.handle, var_k: T.handle, var_v: T.handle,
        var_frequency: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int64()
        offset = T.int64()
        qkv = T.match_buffer(var_qkv, (n, fused, dim), dtype)
        positions = T.match_buffer(var_positions, (n,), "int32", elem_offset=offset)
        q = T.match_buffer(var_q, (n, heads, dim), dtype)
        k = T.match_buffer(var_k, (n, kv_heads, dim), dtype)
        v = T.match_buffer(var_v, (n, kv_heads, dim), dtype)
        frequency = T.match_buffer(var_frequency, (rotary_dim // 2,), "float32")
        with T.sblock("rope"):
            T.reads(qkv[0:n, 0:fused, 0:dim], positions[0:n], frequency[0 : rotary_dim // 2])
            T.writes(q[0:n, 0:heads, 0:dim], k[0:n, 0:kv_heads, 0:dim], v[0:n, 0:kv_heads, 0:dim])
            if n <= _SERIAL:
                for i in T.serial(n):
                    T.evaluate(
                        T.call_extern(
                            "void", "mlcbuild_rope", qkv.data, T.address_of(positions[0]), q.data, k.data, v.data,
                            frequency.data, i, T.int64(heads), T.int64(kv_heads), T.int64(dim), T.int64(rotary_dim),
                        )
                    )  # fmt: skip
            else:
                for i in T.parallel(n):
                    T.evaluate(
                        T.call_extern(
                            "void", "mlcbuild_rope", qkv.data, T.address_of(positions[0]), q.data, k.data, v.data,
                            frequency.data, i, T.int64(heads), T.int64(kv_heads), T.int64(dim), T.int64(rotary_dim),
                        )
                    )  # fmt: skip

    return split_rotary
