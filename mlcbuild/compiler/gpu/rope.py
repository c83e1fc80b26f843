"""Rotary embedding on GPUs: the function that the KV cache calls before it appends keys, and the same inside a layer.

Angles are brought between -π and π first: GPUs compute sine and cosine of large angles badly, and WGSL promises nothing
for them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from tvm import te, tirx
from tvm.script import tirx as T

from mlcbuild.compiler.gpu.rows import float32, int64, private, widened
from mlcbuild.models.rope import Rotary

_TURNS = float(np.float32(1 / (2 * math.pi)))
_HIGH = 6.28125  # 2π in two parts: few enough bits that a product with the number of turns is exact, and the rest
_LOW = float(np.float32(2 * math.pi - _HIGH))


@functools.cache
def split_rotary(heads: int, kv_heads: int, dim: int, rotary: Rotary, dtype: str) -> Any:
    """Fused heads [n, heads + 2 * kv_heads, dim] and positions [n] -> q, k, v, the first two turned.

    The frequencies, float32 [rotary.dim / 2] (one that is not read where nothing is turned), are the table that the
    cache was created with.
    """
    fused, table = heads + 2 * kv_heads, max(rotary.dim // 2, 1)

    @T.prim_func(s_tir=True, private=True)
    def split_rotary(
        var_qkv: T.handle, var_positions: T.handle, var_q: T.handle, var_k: T.handle, var_v: T.handle,
        var_frequency: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        n = T.int64()
        offset = T.int64()
        qkv = T.match_buffer(var_qkv, (n, fused, dim), dtype)
        positions = T.match_buffer(var_positions, (n,), "int32", elem_offset=offset)
        q = T.match_buffer(var_q, (n, heads, dim), dtype)
        k = T.match_buffer(var_k, (n, kv_heads, dim), dtype)
        v = T.match_buffer(var_v, (n, kv_heads, dim), dtype)
        frequency = T.match_buffer(var_frequency, (table,), "float32")
        for i, h, d in T.grid(n, fused, dim):
            with T.sblock("rope"):
                vi, vh, vd = T.axis.remap("SSS", [i, h, d])
                T.reads(positions[vi], frequency[0:table], qkv[vi, vh, 0:dim])
                T.writes(q[vi, 0:heads, vd], k[vi, 0:kv_heads, vd], v[vi, 0:kv_heads, vd])
                if vh < heads:
                    q[vi, vh, vd] = T.cast(_turned(qkv, frequency, positions[vi], vi, vh, vd, rotary), dtype)
                elif vh < heads + kv_heads:
                    k[vi, vh - heads, vd] = T.cast(_turned(qkv, frequency, positions[vi], vi, vh, vd, rotary), dtype)
                else:
                    v[vi, vh - heads - kv_heads, vd] = qkv[vi, vh, vd]

    return split_rotary


@functools.cache
def rope(heads: int, kv_heads: int, dim: int, rotary: Rotary, dtype: str) -> Any:
    """Fused heads, positions [n] and frequencies -> the same heads, queries and keys turned."""
    n = tirx.Var("n", "int64")
    qkv = te.placeholder((n, int64(heads + 2 * kv_heads), int64(dim)), dtype, "qkv")
    positions = te.placeholder((n,), "int32", "positions")
    frequency = te.placeholder((int64(max(rotary.dim // 2, 1)),), "float32", "frequency")

    def value(i: Any, h: Any, d: Any) -> Any:
        turned = _turned(qkv, frequency, positions[i], i, h, d, rotary).astype(dtype)
        return tirx.if_then_else(h < heads + kv_heads, turned, qkv[i, h, d])

    return private([qkv, positions, frequency, te.compute(qkv.shape, value, name="turned")])


def _turned(qkv: Any, frequency: Any, position: Any, i: Any, h: Any, d: Any, rotary: Rotary) -> Any:
    """Value d of head h of token i, turned by its position: float32."""
    half = rotary.dim // 2
    plain = widened(qkv[i, h, d])
    if half == 0:
        return plain
    if rotary.neighbours:
        pair, first = d // 2, d % 2 == 0
        other = tirx.if_then_else(first, d + 1, d - 1)
    else:
        pair, first = d % half, d < half
        other = tirx.if_then_else(first, d + half, d - half)
    inside = d < rotary.dim
    angle = widened(position) * frequency[tirx.if_then_else(inside, pair, 0)]
    turns = tirx.round(angle * float32(_TURNS))
    angle = (angle - turns * float32(_HIGH)) - turns * float32(_LOW)
    beside = widened(qkv[i, h, tirx.if_then_else(inside, other, d)])
    turned = plain * tirx.cos(angle) + tirx.if_then_else(first, -beside, beside) * tirx.sin(angle)
    return tirx.if_then_else(inside, turned * float32(rotary.factor), plain)
