"""Symmetric group quantization: kernels that pack the rows of a matrix, and their inverse.

For each group of `group_size` neighbours along a row, with m = 2^(bits-1) - 1:

    scale = max|w| / m;   code = clip(round(w / scale + m), 0, 2m);   w is about (code - m) * scale

Every operation is rounded to the model dtype, half to even, and codes go little end first into storage words: the
arithmetic of mlc-ai/mlc-llm `group_quantization.py`, whose bytes this reproduces. Where scale is 0 the quotient
follows IEEE 754 and 0 / 0 gives code 0, as in MLC's compiled kernels: an all-zero group is all zero words.

How it is fast in NumPy, whose float16 arithmetic takes 1.5 ns for one operation on one element, against 0.05 ns in
float32: a block of groups is transposed to [position in group, group], so that every operation runs over long
contiguous rows; float16 steps are done in float32 and rounded to 11 bits by hand (`_codes`), which gives the same
bits because float32 has more than twice float16's precision (Figueroa, "When is double rounding innocuous?", 1995).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlcbuild.quantization import floats
from mlcbuild.quantization.floats import Array
from mlcbuild.quantization.schemes import elements_per_word, max_code
from mlcbuild.recipes.types import Weights

Float32 = npt.NDArray[np.float32]

_BLOCK = 1 << 18  # elements of one block: longer rows cost less per operation, more no longer fits the cache

_TO_INTEGER = np.float32(1.5 * 2**23)  # x + this rounds x to an integer, half to even, kept in the low bits
_DROPPED_BITS = {"float16": 13, "bfloat16": 16}  # of float32's 23 mantissa bits
# With a scale of at least this, no code depends on what `_careful` does: a weight too small for float16's normal range
# is less than a quarter of the scale, so its code is m whatever its last bits are; and the scale has full precision,
# so |w| / scale exceeds m by at most one part in 2^11 and no code needs clipping. bfloat16 has too few bits for that.
_SAFE_SCALE = {"float16": np.float32(2.0**-12), "bfloat16": np.float32(np.inf), "float32": np.float32(2.0**-100)}


class BadValue(Exception):
    """A source value is NaN or Inf, or too large for the model dtype. `index` is its flat index in the given rows."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


@dataclass(frozen=True)
class Packed:
    """Rows of a packed matrix: words `[rows, words]`, scales `[rows, groups]` as floats.STORAGE holds them."""

    words: Array
    scales: Array


def encode(rows: Array, source: str, weights: Weights, model_dtype: str) -> Packed:
    """Pack `rows` `[r, K]` of dtype `source`. The caller transposes the result for the KN layout.

    Raises BadValue for the first value that is not finite in the model dtype.
    """
    count, k = rows.shape
    size = weights.group_size
    groups = -(-k // size)
    words_per_group = size // elements_per_word(weights)
    words = np.empty((count, groups * words_per_group), weights.storage_dtype)
    scales = np.empty((count, groups), floats.STORAGE[model_dtype])
    step = max(1, _BLOCK // (groups * size))
    work = _Work(min(step, count) * groups, weights)
    for start in range(0, count, step):
        block = _groups(rows[start : start + step], size)
        packed, scale = _encode_block(block, source, weights, model_dtype, work)
        if scale is None:
            index = floats.first_bad(rows[start : start + step], source, model_dtype)
            assert index is not None
            raise BadValue(start * k + index)
        words[start : start + step] = packed.reshape(-1, groups * words_per_group)
        scales[start : start + step] = scale.reshape(-1, groups)
    if k % size:
        words[:, -words_per_group:] &= _tail_mask(k % size, weights)
    return Packed(words, scales)


def decode(packed: Packed, k: int, weights: Weights, model_dtype: str) -> Float32:
    """The weights `[rows, k]` that NK rows stand for: (code - m) * scale, rounded to the model dtype, as float32."""
    per_word, m = elements_per_word(weights), max_code(weights)
    shifts = np.arange(per_word, dtype=packed.words.dtype) * packed.words.dtype.type(weights.bits)
    codes = packed.words[:, :, None] >> shifts & packed.words.dtype.type((1 << weights.bits) - 1)
    steps = codes.reshape(len(codes), -1)[:, :k].astype(np.float32) - np.float32(m)
    scales = floats.widen(packed.scales, model_dtype).repeat(weights.group_size, axis=1)[:, :k]
    return floats.widen(floats.cast(steps * scales, "float32", model_dtype), model_dtype)


class _Work:
    """Buffers for a block, made once for many blocks: fresh pages cost more than the arithmetic."""

    def __init__(self, groups: int, weights: Weights) -> None:
        per_word = elements_per_word(weights)
        self.shape = (per_word, weights.group_size // per_word, groups)
        self.values = np.empty(self.shape, np.float32)
        self.spare = np.empty(self.shape, np.float32)

    def views(self, groups: int) -> tuple[Float32, Float32]:
        """Both buffers as `[position in word, word of the group, group]` for that many groups."""
        shape = (*self.shape[:2], groups)
        size = shape[0] * shape[1] * groups
        return self.values.reshape(-1)[:size].reshape(shape), self.spare.reshape(-1)[:size].reshape(shape)


def _groups(rows: Array, size: int) -> Array:
    """`rows` `[r, K]` as `[r * groups, size]`, the last group of each row filled up with zeros."""
    count, k = rows.shape
    if k % size:
        padded = np.zeros((count, -(-k // size) * size), rows.dtype)
        padded[:, :k] = rows
        rows = padded
    if not (rows.flags.c_contiguous and rows.ctypes.data % 4 == 0):
        rows = np.array(rows, order="C")
    return rows.reshape(-1, size)


def _encode_block(
    block: Array, source: str, weights: Weights, model_dtype: str, work: _Work
) -> tuple[Array, Array | None]:
    """Words `[groups, words]` and scales `[groups]` of `block` `[groups, size]`; scales are None for a bad value."""
    m = max_code(weights)
    values, spare = work.views(len(block))
    # A bfloat16 value is a float16 one unless it is very small, which matters to very small scales only: see below.
    deferred = (source, model_dtype) == ("bfloat16", "float16")
    if not deferred and model_dtype != "float32":
        block, source = floats.cast(block, source, model_dtype), model_dtype
    _transpose(block, source, values, spare)
    largest = _largest(values)
    # The float16 bits of Inf and NaN widen to 65536 and more.
    if floats.first_bad(largest, "float32", "float16" if source == "float16" else model_dtype) is not None:
        return largest, None
    largest = floats.widen(floats.cast(largest, "float32", model_dtype), model_dtype)
    scale = floats.cast(largest / np.float32(m), "float32", model_dtype)
    divisor = floats.widen(scale, model_dtype)
    careful = bool(divisor.min() < _SAFE_SCALE[model_dtype])
    if careful and deferred:
        _transpose(floats.cast(block, source, model_dtype), model_dtype, values, spare)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        values /= divisor
    _codes(values, spare, m, model_dtype, careful)
    return _pack(values.view(np.uint32), spare.view(np.uint32)[0], weights), scale


def _transpose(block: Array, source: str, values: Float32, spare: Float32) -> None:
    """Widen `block` `[groups, size]` into `values` `[position in word, word, group]`."""
    per_word, words, groups = values.shape
    if source == "float32" or per_word % 2:
        wide = floats.widen(block, source)
        np.copyto(values, wide.reshape(groups, words, per_word).transpose(2, 1, 0))
        return
    # Two neighbours at a time, as one 32-bit item whose halves are then widened in place. Little-endian hosts only.
    pairs = spare.view(np.uint32)[: per_word // 2]
    np.copyto(pairs, block.view(np.uint32).reshape(groups, words, per_word // 2).transpose(2, 1, 0))
    bits = values.view(np.uint32)
    even, odd = bits[0::2], bits[1::2]
    np.left_shift(pairs, np.uint32(16), out=even)
    if source == "bfloat16":
        np.bitwise_and(pairs, np.uint32(0xFFFF0000), out=odd)
        return
    # float16: exponent and mantissa move down 3 bits under the sign, and the exponent's bias changes by 127 - 15.
    np.right_shift(pairs.view(np.int32), np.int32(3), out=odd.view(np.int32))
    np.right_shift(even.view(np.int32), np.int32(3), out=even.view(np.int32))
    bits &= np.uint32(0x8FFFE000)
    values *= np.float32(2.0**112)


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
    values += _TO_INTEGER


def _pack(bits: Array, word: Array, weights: Weights) -> Array:
    """Words `[groups, words]` of codes `[position in word, word, group]` that still carry the bits of 1.5 * 2^23.

    Those bits are the same in every code, so they are taken out of the finished word at once, modulo 2^32.
    """
    carried = int(_TO_INTEGER.view(np.uint32))
    np.copyto(word, bits[-1])
    for codes in bits[-2::-1]:
        word <<= np.uint32(weights.bits)
        word += codes
    total = sum(carried << (weights.bits * position) for position in range(len(bits)))
    word -= np.uint32(total & 0xFFFFFFFF)
    return word.T.astype(weights.storage_dtype)


def _tail_mask(used: int, weights: Weights) -> Array:
    """`[words of a group]`: ones where the first `used` codes of a group lie."""
    per_word = elements_per_word(weights)
    masks = []
    for start in range(0, weights.group_size, per_word):
        codes = min(max(used - start, 0), per_word)
        masks.append((1 << (weights.bits * codes)) - 1)
    return np.array(masks, dtype=weights.storage_dtype)
