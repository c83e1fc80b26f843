"""Row-wise operations on the CPU: TIR functions that give rows to the kernels of kernels/rows.c."""

from __future__ import annotations

import functools
from typing import Any

from tvm.script import tirx as T


@functools.cache
def rms_norm(width: int, eps: float, dtype: str) -> Any:
    """x [n, width] float32, w [width] dtype -> [n, width] float32."""
    kernel = f"mlcbuild_rms_norm_{dtype}"

    @T.prim_func(s_tir=True, private=True)
    def norm(var_x: T.handle, var_w: T.handle, var_y: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int64()
        x = T.match_buffer(var_x, (n, width), "float32")
        w = T.match_buffer(var_w, (width,), dtype)
        y = T.match_buffer(var_y, (n, width), "float32")
        with T.sblock("norm"):
            T.reads(x[0:n, 0:width], w[0:width])
            T.writes(y[0:n, 0:width])
            if n == T.int64(1):
                T.evaluate(
                    T.call_extern("void", kernel, x.data, w.data, y.data, T.int64(0), T.int64(width), T.float32(eps))
                )
            else:
                for i in T.parallel(n):
                    T.evaluate(T.call_extern("void", kernel, x.data, w.data, y.data, i, T.int64(width), T.float32(eps)))

    return norm


@functools.cache
def gated(activation: str, width: int) -> Any:
    """[gate | up] [n, 2 * width] -> activation(gate) * up [n, width], float32."""
    kernel = f"mlcbuild_gated_{activation}"

    @T.prim_func(s_tir=True, private=True)
    def gate(var_x: T.handle, var_y: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int64()
        x = T.match_buffer(var_x, (n, 2 * width), "float32")
        y = T.match_buffer(var_y, (n, width), "float32")
        with T.sblock("gate"):
            T.reads(x[0:n, 0 : 2 * width])
            T.writes(y[0:n, 0:width])
            if n == T.int64(1):
                T.evaluate(T.call_extern("void", kernel, x.data, y.data, T.int64(0), T.int64(width)))
            else:
                for i in T.parallel(n):
                    T.evaluate(T.call_extern("void", kernel, x.data, y.data, i, T.int64(width)))

    return gate


@functools.cache
def softmax() -> Any:
    """logits [b, V], temperature [b] -> probabilities [b, V], all float32."""

    @T.prim_func(s_tir=True, private=True)
    def softmax_with_temperature(var_x: T.handle, var_t: T.handle, var_y: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        b = T.int64()
        width = T.int64()
        x = T.match_buffer(var_x, (b, width), "float32")
        t = T.match_buffer(var_t, (b,), "float32")
        y = T.match_buffer(var_y, (b, width), "float32")
        with T.sblock("softmax"):
            T.reads(x[0:b, 0:width], t[0:b])
            T.writes(y[0:b, 0:width])
            for i in T.parallel(b):
                T.evaluate(T.call_extern("void", "mlcbuild_softmax_float32", x.data, t.data, y.data, i, width))

    return softmax_with_temperature


@functools.cache
def rope(heads: int, kv_heads: int, dim: int, rotary_dim: int, dtype: str) -> Any:
    """Fused heads [n, heads + 2 * kv_heads, dim] and positions [n] -> q, k, v, the first two turned.

    The KV cache calls it; `frequency` [rotary_dim / 2] float32 is the table that it was created with.
    """
    kernel = f"mlcbuild_rope_{dtype}"
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
            for i in T.parallel(n):
                T.evaluate(
                    T.call_extern(
                        "void", kernel, qkv.data, T.address_of(positions[0]), q.data, k.data, v.data, frequency.data,
                        i, T.int64(heads), T.int64(kv_heads), T.int64(dim), T.int64(rotary_dim),
                    )
                )  # fmt: skip

    return split_rotary
