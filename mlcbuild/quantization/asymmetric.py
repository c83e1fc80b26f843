"""Asymmetric group quantization between minimum and maximum, the float32 format q4f32_0 of the 2023 tutorials.

For each group of `group_size` neighbours along a row, in float32 arithmetic, half to even:

    scale = (max - min) / (2^bits - 1);   code = clip(round((w - min) / scale), 0, 2^bits - 1)

Stored are the codes, and scale and min rounded to bfloat16 as the low and high half of one uint32; w is about
code * scale + min with those. Codes are found with the unrounded ones. In a group of equal values scale is 0, all codes
are 0 (0 / 0 counts as 0), and the group decodes to its value as bfloat16. K is a multiple of the group size.
"""

from __future__ import annotations

import numpy as np

from mlcbuild.quantization import floats
from mlcbuild.quantization.floats import Array, BadValue, Float32
from mlcbuild.quantization.packing import TO_INTEGER, Packed, codes_of, in_blocks, pack, per_value, transpose
from mlcbuild.recipes.types import Weights

_BLOCK = 1 << 18
_HALF = np.uint32(16)


def encode(rows: Array, source: str, weights: Weights) -> Packed:
    """Pack `rows` `[r, K]` of dtype `source`.

    Raises BadValue for the first value that is not finite, and for a group whose values are too far apart for a scale
    and a minimum in bfloat16.
    """
    floats.check(rows, source, "bfloat16")

    def block(groups: Array, values: Float32, spare: Float32) -> tuple[Array, Array]:
        transpose(groups, source, values, spare)
        flat = values.reshape(-1, values.shape[2])
        least, most = np.minimum.reduce(flat, axis=0), np.maximum.reduce(flat, axis=0)
        with np.errstate(over="ignore", invalid="ignore"):
            reach = most - least
        if floats.first_bad(reach, "float32", "bfloat16") is not None:
            raise BadValue(int(np.argmax(np.abs(floats.widen(rows, source)))), "bfloat16")
        scale = reach / np.float32((1 << weights.bits) - 1)
        values -= least
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            values /= scale
        np.fmax(values, np.float32(0), out=values)  # NaN, from 0 / 0, becomes 0
        np.minimum(values, np.float32((1 << weights.bits) - 1), out=values)
        values += TO_INTEGER
        pair = floats.cast(least, "float32", "bfloat16").astype(np.uint32) << _HALF
        pair |= floats.cast(scale, "float32", "bfloat16")
        return pack(values.view(np.uint32), spare.view(np.uint32)[0], weights), pair

    return in_blocks(rows, weights, np.dtype(np.uint32), _BLOCK, block)


def decode(packed: Packed, k: int, weights: Weights) -> Float32:
    """The weights `[rows, k]` that NK rows stand for: code * scale + min in float32."""
    scale = floats.widen(packed.scales.astype(np.uint16), "bfloat16")
    least = floats.widen((packed.scales >> _HALF).astype(np.uint16), "bfloat16")
    steps = codes_of(packed, k, weights) * per_value(scale, k, weights)
    result: Float32 = steps + per_value(least, k, weights)
    return result
