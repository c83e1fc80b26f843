"""The rows of a matrix as blocks of groups, and codes as words: what all schemes with groups have in common.

NumPy is fast over long contiguous rows, so a block of groups is transposed to [position in group, group]; the position
is split into (position in word, word of the group), which makes packing a word one operation per position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from mlcbuild.quantization import floats
from mlcbuild.quantization.floats import Array, Float32
from mlcbuild.quantization.schemes import elements_per_word
from mlcbuild.recipes.types import Weights

TO_INTEGER = np.float32(1.5 * 2**23)  # x + this rounds x to an integer, half to even, kept in the low bits


@dataclass(frozen=True)
class Packed:
    """Rows of a packed matrix: words `[rows, words]`, and `[rows, groups]` scales as floats.STORAGE holds them.

    In the asymmetric format `scales` are its uint32 pairs of scale and minimum.
    """

    words: Array
    scales: Array


def in_blocks(
    rows: Array,
    weights: Weights,
    scales_dtype: np.dtype[np.generic],
    elements: int,
    encode: Callable[[Array, Float32, Float32], tuple[Array, Array]],
) -> Packed:
    """Pack `rows` `[r, K]`, about `elements` of them at a time.

    `encode` is given a block `[groups, size]`, the last group of each row filled up with zeros, and two buffers
    `[position in word, word of the group, group]`; it returns the block's words `[groups, words of a group]` and scales
    `[groups]`. The tail of a partial last group is 0 in the words.
    """
    k, size = rows.shape[1], weights.group_size
    packed = empty(rows, weights, scales_dtype)
    step = _rows_of_a_block(k, weights, elements)
    # Made once for all blocks: fresh pages cost more than the arithmetic.
    shape = _shape(groups_of_a_block(rows, weights, elements), weights)
    values, spare = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        block = _groups(rows[part], size)
        shape = _shape(len(block), weights)
        words, scales = encode(block, head(values, shape), head(spare, shape))
        packed.words[part] = words.reshape(-1, packed.words.shape[1])
        packed.scales[part] = scales.reshape(-1, packed.scales.shape[1])
    if k % size:
        mask = _tail_mask(k % size, weights)
        packed.words[:, -len(mask) :] &= mask
    return packed


def empty(rows: Array, weights: Weights, scales_dtype: np.dtype[np.generic]) -> Packed:
    """Room for `rows` `[r, K]` packed."""
    groups = -(-rows.shape[1] // weights.group_size)
    words = groups * (weights.group_size // elements_per_word(weights))
    return Packed(np.empty((len(rows), words), weights.storage_dtype), np.empty((len(rows), groups), scales_dtype))


def groups_of_a_block(rows: Array, weights: Weights, elements: int) -> int:
    """The most groups that `in_blocks` puts into one block."""
    k: int = rows.shape[1]
    return min(_rows_of_a_block(k, weights, elements), len(rows)) * -(-k // weights.group_size)


def head(buffer: Float32, shape: tuple[int, ...]) -> Float32:
    """The first elements of a buffer, in this shape."""
    return buffer.reshape(-1)[: prod(shape)].reshape(shape)


def _rows_of_a_block(k: int, weights: Weights, elements: int) -> int:
    return max(1, elements // (-(-k // weights.group_size) * weights.group_size))


def _shape(groups: int, weights: Weights) -> tuple[int, int, int]:
    """[position in word, word of the group, group]"""
    per_word = elements_per_word(weights)
    return per_word, weights.group_size // per_word, groups


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


def transpose(block: Array, source: str, values: Float32, spare: Float32) -> None:
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


def pack(bits: Array, word: Array, weights: Weights) -> Array:
    """Words `[groups, words]` of codes `[position in word, word, group]` that still carry the bits of 1.5 * 2^23.

    Those bits are the same in every code, so they are taken out of the finished word at once, modulo 2^32.
    """
    carried = int(TO_INTEGER.view(np.uint32))
    np.copyto(word, bits[-1])
    for codes in bits[-2::-1]:
        word <<= np.uint32(weights.bits)
        word += codes
    total = sum(carried << (weights.bits * position) for position in range(len(bits)))
    word -= np.uint32(total & 0xFFFFFFFF)
    return word.T.astype(weights.storage_dtype)


def codes_of(packed: Packed, k: int, weights: Weights) -> Float32:
    """The codes `[rows, k]`."""
    per_word, word = elements_per_word(weights), packed.words.dtype.type
    shifts = np.arange(per_word, dtype=packed.words.dtype) * word(weights.bits)
    codes = packed.words[:, :, None] >> shifts & word((1 << weights.bits) - 1)
    result: Float32 = codes.reshape(len(codes), -1)[:, :k].astype(np.float32)
    return result


def per_value(of_groups: Float32, k: int, weights: Weights) -> Float32:
    """What belongs to groups `[rows, groups]`, for each value `[rows, k]`."""
    return of_groups.repeat(weights.group_size, axis=1)[:, :k]


def _tail_mask(used: int, weights: Weights) -> Array:
    """`[words of a group]`: ones where the first `used` codes of a group lie."""
    per_word = elements_per_word(weights)
    masks = []
    for start in range(0, weights.group_size, per_word):
        codes = min(max(used - start, 0), per_word)
        masks.append((1 << (weights.bits * codes)) - 1)
    return np.array(masks, dtype=weights.storage_dtype)
