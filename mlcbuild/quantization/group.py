"""Symmetric group quantization: the kernel that packs the rows of a matrix, and its inverse.

For each group of `group_size` neighbours along a row, with m = 2^(bits-1) - 1:

    scale = max|w| / m;   code = clip(round(w / scale + m), 0, 2m);   w is about (code - m) * scale

Every operation is rounded to the model dtype, half to even, and codes go little end first into storage words: the
arithmetic of mlc-ai/mlc-llm `group_quantization.py`, whose bytes this reproduces. Where scale is 0 the quotient
follows IEEE 754 and 0 / 0 gives code 0, as in MLC's compiled kernels: an all-zero group is all zero words. The formats
of 2023 have a `scale_floor`: max|w| is at least that, so that an all-zero group has codes m instead.

How it is fast in NumPy, whose float16 arithmetic takes 1.5 ns for one operation on one element, against 0.05 ns in
float32: float16 steps are done in float32 and rounded to 11 bits by hand (`_codes`), which gives the same bits because
float32 has more than twice float16's precision (Figueroa, "When is double rounding innocuous?", 1995).
"""

from __future__ import annotations

import numpy as np

from mlcbuild.quantization import floats
from mlcbuild.quantization.floats import Array, Float32
from mlcbuild.quantization.packing import TO_INTEGER, Packed, codes_of, in_blocks, pack, per_value, transpose
from mlcbuild.quantization.schemes import max_code
from mlcbuild.recipes.types import Weights

_BLOCK = 1 << 18  # elements of one block: longer rows cost less per operation, more no longer fits the cache

_DROPPED_BITS = {"float16": 13, "bfloat16": 16}  # of float32's 23 mantissa bits
# With a scale of at least this, no code depends on what `_careful` does: a weight too small for float16's normal range
# is less than a quarter of the scale, so its code is m whatever its last bits are; and the scale has full precision,
# so |w| / scale exceeds m by at most one part in 2^11 and no code needs clipping. bfloat16 has too few bits for that.
_SAFE_SCALE = {"float16": np.float32(2.0**-12), "bfloat16": np.float32(np.inf), "float32": np.float32(2.0**-100)}


def encode(rows: Array, source: str, weights: Weights, model_dtype: str) -> Packed:
    """Pack `rows` `[r, K]` of dtype `source`. The caller transposes the result for the KN layout.

    Raises BadValue for the first value that is not finite in the model dtype.
    """

    def block(groups: Array, values: Float32, spare: Float32) -> tuple[Array, Array]:
        packed, scale = _encode_block(groups, source, weights, model_dtype, (values, spare))
        if scale is None:
            floats.check(rows, source, model_dtype)
        assert scale is not None
        return packed, scale

    return in_blocks(rows, weights, floats.STORAGE[model_dtype], _BLOCK, block)


def decode(packed: Packed, k: int, weights: Weights, model_dtype: str) -> Float32:
    """The weights `[rows, k]` that NK rows stand for: (code - m) * scale, rounded to the model dtype, as float32."""
    steps = codes_of(packed, k, weights) - np.float32(max_code(weights))
    scales = per_value(floats.widen(packed.scales, model_dtype), k, weights)
    return floats.widen(floats.cast(steps * scales, "float32", model_dtype), model_dtype)


def _encode_block(
    block: Array, source: str, weights: Weights, model_dtype: str, work: tuple[Float32, Float32]
) -> tuple[Array, Array | None]:
    """Words `[groups, words]` and scales `[groups]` of `block` `[groups, size]`; scales are None for a bad value."""
    m = max_code(weights)
    values, spare = work
    # A bfloat16 value is a float16 one unless it is very small, which matters to very small scales only: see below.
    deferred = (source, model_dtype) == ("bfloat16", "float16")
    if not deferred and model_dtype != "float32":
        block, source = floats.cast(block, source, model_dtype), model_dtype
    transpose(block, source, values, spare)
    largest = _largest(values)
    # The float16 bits of Inf and NaN widen to 65536 and more.
    if floats.first_bad(largest, "float32", "float16" if source == "float16" else model_dtype) is not None:
        return largest, None
    if weights.scale_floor:
        np.maximum(largest, np.float32(weights.scale_floor), out=largest)
    largest = floats.widen(floats.cast(largest, "float32", model_dtype), model_dtype)
    scale = floats.cast(largest / np.float32(m), "float32", model_dtype)
    divisor = floats.widen(scale, model_dtype)
    careful = bool(divisor.min() < _SAFE_SCALE[model_dtype])
    if careful and deferred:
        transpose(floats.cast(block, source, model_dtype), model_dtype, values, spare)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        values /= divisor
    _codes(values, spare, m, model_dtype, careful)
    return pack(values.view(np.uint32), spare.view(np.uint32)[0], weights), scale


def _largest(values: Float32) -> Float32:
    """max|w| per group; NaN where the group has one."""
    flat = values.reshape(-1, values.shape[2])
    largest: Float32 = np.maximum(np.maximum.reduce(flat, axis=0), -np.minimum.reduce(flat, axis=0))
    return np.abs(largest)


def _codes(values: Float32, spare: Float32, m: int, model_dtype: str, careful: bool) -> None:
    """Turn quotients w / scale, in place, into 1.5 * 2^23 + code.

    For a 16-bit model dtype: the quotient of two such values is never halfway between two others (it would need one
    more bit in the numerator), so it is rounded by adding half and cutting. The sum can be halfway; Veltkamp's split
    ((x * c) - (x * c - x), c = 2^dropped + 1) rounds it to the remaining bits; the tests compare both steps with
    float16 arithmetic for all values.
    """
    if careful:  # Inf and NaN from tiny scales: NaN becomes code 0, the rest is clipped below
        np.fmax(values, np.float32(-2 * m), out=values)
        np.fmin(values, np.float32(2 * m), out=values)
    if model_dtype != "float32":
        dropped = _DROPPED_BITS[model_dtype]
        bits = values.view(np.uint32)
        bits += np.uint32(1 << (dropped - 1))
        bits &= np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)
        values += np.float32(m)
        np.multiply(values, np.float32((1 << dropped) + 1), out=spare)
        np.subtract(spare, values, out=values)
        np.subtract(spare, values, out=values)
    else:
        values += np.float32(m)
    if careful:
        np.clip(values, np.float32(0), np.float32(2 * m), out=values)
    values += TO_INTEGER
