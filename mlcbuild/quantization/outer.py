"""Quantization of a whole matrix between the minima and maxima of its rows and columns: q8f16_0, RWKV's format of 2023.

For w `[N out, K in]`, in float32 arithmetic (BlinkDL/ChatRWKV's int8 strategy, whose matrices are [K, N]):

    K > N:   min_in[k] = min over n of w;    min_out[n] = min over k of w - min_in
    K <= N:  min_out[n] = min over k of w;   min_in[k] = min over n of w - min_out
    u = w without both minima, subtracted in that order
    max_out[n] = max over k of u;   max_in[k] = max over n of u / max_out
    code = clip(floor(u / max_out / max_in * 256), 0, 255)

Stored are the codes, the minima, and scale = max / 16 in the model dtype;

    w is about (code + 1/2) * scale_in[k] * scale_out[n] + min_in[k] + min_out[n].

A row or column whose maximum is 0 has quotients 0. The matrix is read three times, in pieces of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from mlcbuild.quantization import floats
from mlcbuild.quantization.floats import Array, Float32

STORED = ("q_scale_in", "q_scale_out", "q_min_in", "q_min_out")  # the vectors, in order

_SIXTEENTH = np.float32(1 / 16)

# A piece of rows, [r, K] float32, and the number of its first row.
Piece = tuple[Float32, int]
# Applies a function to every piece of the matrix, in order, perhaps in parallel.
Map = Callable[[Callable[[Float32, int], Array]], Iterable[Array]]


@dataclass(frozen=True)
class Ranges:
    """Minima and maxima, float32: `*_in` `[K]`, `*_out` `[N]`."""

    min_in: Float32
    min_out: Float32
    max_in: Float32
    max_out: Float32

    def stored(self, model_dtype: str) -> tuple[Array, Array, Array, Array]:
        """scale_in, scale_out, min_in, min_out in the model dtype."""
        scales = (self.max_in * _SIXTEENTH, self.max_out * _SIXTEENTH)
        one, two, three, four = (
            floats.cast(values, "float32", model_dtype) for values in (*scales, self.min_in, self.min_out)
        )
        return one, two, three, four


def ranges(n: int, k: int, each: Map) -> Ranges:
    """The ranges of a finite `[n, k]` matrix, which `each` goes through twice."""
    min_out, max_out = np.empty(n, np.float32), np.empty(n, np.float32)
    zeros = np.zeros(k, np.float32)

    def first(rows: Float32, start: int) -> Float32:
        if k > n:
            return _least(rows, 0)
        least = min_out[start : start + len(rows)] = _least(rows, 1)
        return _least(rows - least[:, None], 0)

    min_in = np.minimum.reduce(list(each(first))) if n else zeros

    def second(rows: Float32, start: int) -> Float32:
        part = slice(start, start + len(rows))
        if k > n:
            rows = rows - min_in
            least = min_out[part] = _least(rows, 1)
            rows -= least[:, None]
        else:
            rows = rows - min_out[part, None]
            rows -= min_in
        most = max_out[part] = rows.max(axis=1, initial=0)
        column: Float32 = _quotients(rows, most[:, None]).max(axis=0, initial=0)
        return column

    max_in = np.maximum.reduce(list(each(second))) if n else zeros
    return Ranges(min_in, min_out, max_in, max_out)


def encode(rows: Float32, start: int, found: Ranges) -> Array:
    """Codes `[r, K]` uint8 of the rows from `start` of the matrix with these ranges."""
    part = slice(start, start + len(rows))
    if rows.shape[1] > len(found.min_out):
        rows = rows - found.min_in
        rows -= found.min_out[part, None]
    else:
        rows = rows - found.min_out[part, None]
        rows -= found.min_in
    rows = _quotients(_quotients(rows, found.max_out[part, None]), found.max_in)
    rows *= np.float32(256)
    np.clip(np.floor(rows, out=rows), 0, 255, out=rows)
    return rows.astype(np.uint8)


def decode(codes: Array, scale_in: Array, scale_out: Array, min_in: Array, min_out: Array, model_dtype: str) -> Float32:
    """The weights `[n, k]` that NK codes stand for, computed in float32 and rounded to the model dtype once."""
    vectors = (floats.widen(each, model_dtype) for each in (scale_in, scale_out, min_in, min_out))
    in_scale, out_scale, in_min, out_min = vectors
    values = codes.astype(np.float32) + np.float32(0.5)
    values *= in_scale
    values *= out_scale[:, None]
    values += in_min
    values += out_min[:, None]
    return floats.widen(floats.cast(values, "float32", model_dtype), model_dtype)


def _least(rows: Float32, axis: int) -> Float32:
    least: Float32 = rows.min(axis=axis, initial=np.inf)
    return least


def _quotients(rows: Float32, divisor: Float32) -> Float32:
    """rows / divisor, 0 where the divisor is 0."""
    result = np.zeros_like(rows)
    np.divide(rows, divisor, out=result, where=divisor != 0)
    return result
