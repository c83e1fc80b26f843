"""Matrix products on the CPU: TIR functions that give blocks of weight rows to the kernels of kernels/linear.c."""

from __future__ import annotations

import functools
from typing import Any

from tvm.script import tirx as T

ROWS = 16  # weight rows of one task; ROWS in linear.c
_MAX_LANES = 16
_SERIAL_ROWS = 8  # fewer rows of activations than this are packed by the calling thread


@functools.cache
def dense(in_features: int, x_dtype: str, dtype: str, out_dtype: str) -> Any:
    """x [n, K] x_dtype, w [N, K] dtype -> x · wᵀ [n, N] out_dtype, as a PrimFunc with symbolic n and N."""
    columns = in_features
    padded = -(-columns // _MAX_LANES) * _MAX_LANES
    pack, multiply = f"mlcbuild_pack_{x_dtype}", f"mlcbuild_linear_{dtype}_{out_dtype}"

    @T.prim_func(s_tir=True, private=True)
    def linear(var_x: T.handle, var_w: T.handle, var_y: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int64()
        out_features = T.int64()
        x = T.match_buffer(var_x, (n, columns), x_dtype)
        w = T.match_buffer(var_w, (out_features, columns), dtype)
        y = T.match_buffer(var_y, (n, out_features), out_dtype)
        with T.sblock("linear"):
            T.reads(x[0:n, 0:columns], w[0:out_features, 0:columns])
            T.writes(y[0:n, 0:out_features])
            packed = T.sblock_alloc_buffer((n * padded,), "float32")
            if n < _SERIAL_ROWS:
                for i in T.serial(n):
                    T.evaluate(T.call_extern("void", pack, x.data, packed.data, i, T.int64(columns), T.int64(padded)))
            else:
                for i in T.parallel(n):
                    T.evaluate(T.call_extern("void", pack, x.data, packed.data, i, T.int64(columns), T.int64(padded)))
            for block in T.parallel((out_features + ROWS - 1) // ROWS):
                T.evaluate(
                    T.call_extern(
                        "void", multiply, packed.data, w.data, y.data, n, out_features, T.int64(columns),
                        T.int64(padded), block * ROWS, T.min(T.int64(ROWS), out_features - block * ROWS),
                    )
                )  # fmt: skip

    return linear


@functools.cache
def group_quantized(in_features: int, bits: int, group_size: int, x_dtype: str, dtype: str, out_dtype: str) -> Any:
    """x [n, K] x_dtype, w [N, words] uint32, scale [N, groups] dtype -> x · dequantize(w)ᵀ [n, N] out_dtype."""
    columns = in_features
    per_word = 32 // bits
    groups = -(-columns // group_size)
    words = groups * (group_size // per_word)
    padded = -(-words // _MAX_LANES) * _MAX_LANES * per_word
    pack, multiply = f"mlcbuild_pack_words_{x_dtype}", f"mlcbuild_linear_int{bits}_{dtype}_{out_dtype}"

    @T.prim_func(s_tir=True, private=True)
    def linear(var_x: T.handle, var_w: T.handle, var_scale: T.handle, var_y: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int64()
        out_features = T.int64()
        x = T.match_buffer(var_x, (n, columns), x_dtype)
        w = T.match_buffer(var_w, (out_features, words), "uint32")
        scale = T.match_buffer(var_scale, (out_features, groups), dtype)
        y = T.match_buffer(var_y, (n, out_features), out_dtype)
        with T.sblock("linear"):
            T.reads(x[0:n, 0:columns], w[0:out_features, 0:words], scale[0:out_features, 0:groups])
            T.writes(y[0:n, 0:out_features])
            packed = T.sblock_alloc_buffer((n * padded,), "float32")
            if n < _SERIAL_ROWS:
                for i in T.serial(n):
                    T.evaluate(
                        T.call_extern(
                            "void", pack, x.data, packed.data, i, T.int64(columns), T.int64(padded), T.int64(per_word)
                        )
                    )
            else:
                for i in T.parallel(n):
                    T.evaluate(
                        T.call_extern(
                            "void", pack, x.data, packed.data, i, T.int64(columns), T.int64(padded), T.int64(per_word)
                        )
                    )
            for block in T.parallel((out_features + ROWS - 1) // ROWS):
                T.evaluate(
                    T.call_extern(
                        "void", multiply, packed.data, w.data, scale.data, y.data, n, out_features, T.int64(words),
                        T.int64(groups), T.int64(padded), block * ROWS,
                        T.min(T.int64(ROWS), out_features - block * ROWS),
                    )
                )  # fmt: skip

    return linear
