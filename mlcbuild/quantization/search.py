"""Better rounding into the symmetric format: the scale of each group is searched for least squared error.

The format has 2^bits codes, code - m from -m to m + 1. The reference rounding (`group.py`) never uses the last one, and
a scale may be negative. So for every group this tries scales that put the largest weight at or near m + 1 steps,
and at or near m steps (which is the same with the other sign), solves each attempt's codes for the scale that fits them
best in the least-squares sense (for codes c: sum h w c / sum h c^2), and keeps the best, once more refitted. What is
compared in the end are errors with scales rounded to the model dtype, the reference rounding's among them, so no
group's error exceeds the reference rounding's. h weights the error of each input column; without weights it is 1.

The idea of trying several scales and refitting each is that of llama.cpp's `make_qx_quants`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlcbuild.quantization import floats
from mlcbuild.quantization.floats import Array, Float32
from mlcbuild.quantization.packing import TO_INTEGER, Packed, groups_of_a_block, head, in_blocks, pack, transpose
from mlcbuild.quantization.schemes import elements_per_word, max_code
from mlcbuild.recipes.types import Weights

_BLOCK = 1 << 17  # elements: the arrays of a block, which are gone through again and again, stay in the cache

# Where attempts put a group's largest weight, in steps beyond m: on the side that has the spare code, on the other one.
_STEPS = (tuple(np.arange(-1.0, 2.1, 0.25)), ())
_STEPS_WEIGHTED = (tuple(np.arange(-1.5, 3.6, 0.25)), tuple(np.arange(-1.0, 1.6, 0.5)))
_FEWEST = 0.75  # but never at fewer steps than this


def encode(rows: Array, source: str, weights: Weights, model_dtype: str, importance: Float32 | None = None) -> Packed:
    """Pack `rows` `[r, K]` of dtype `source`; `importance` `[K]` weights the squared error of each column.

    Raises BadValue for the first value that is not finite in the model dtype.
    """
    floats.check(rows, source, model_dtype)
    groups = groups_of_a_block(rows, weights, _BLOCK)
    one, other = (np.empty(groups * weights.group_size, np.float32) for _ in range(2))
    search = _Search(max_code(weights), model_dtype, one, other)
    h = None if importance is None else _tiled(importance, groups, weights)

    def block(block: Array, x: Float32, codes: Float32) -> tuple[Array, Array]:
        transpose(block, source, x, codes)
        shape = (-1, len(block))
        found = search.scale(x.reshape(shape), codes.reshape(shape), None if h is None else h[:, : len(block)])
        search.codes(x.reshape(shape), found, codes.reshape(shape))
        codes += np.float32(search.m)
        codes += TO_INTEGER
        words = pack(codes.view(np.uint32), x.view(np.uint32)[0], weights)
        return words, floats.cast(found, "float32", model_dtype)

    return in_blocks(rows, weights, floats.STORAGE[model_dtype], _BLOCK, block)


@dataclass(frozen=True)
class _Search:
    """Works on blocks `[position, group]`; the buffers are at least as large as a block."""

    m: int
    model_dtype: str
    one: Float32
    other: Float32

    def scale(self, x: Float32, codes: Float32, h: Float32 | None) -> Float32:
        """The best scale `[groups]` of each group, of the model dtype; `codes` is overwritten."""
        hx = x if h is None else np.multiply(x, h, out=head(self.one, x.shape))
        product = head(self.other, x.shape)
        most, least = np.maximum.reduce(x, axis=0), np.minimum.reduce(x, axis=0)
        largest = np.abs(np.maximum(most, -least))  # and of zeros no negative one
        unit = np.where(most >= -least, largest, -largest)  # the largest weight with its sign
        groups = x.shape[1]
        best_fit, best = np.full(groups, -1, np.float32), np.zeros(groups, np.float32)
        usual, mirrored = _STEPS if h is None else _STEPS_WEIGHTED
        with np.errstate(all="ignore"):
            for side, steps in ((unit, usual), (-unit, mirrored)):
                for step in steps:
                    steps_of_largest = np.float32(max(self.m + step, _FEWEST))
                    np.multiply(x, steps_of_largest / side, out=codes)
                    self._to_codes(codes)
                    cross, square = self._sums(hx, codes, h, product)
                    fit = cross * cross / square  # what this attempt explains of sum h w^2, with its best scale
                    better = fit > best_fit
                    np.copyto(best_fit, fit, where=better)
                    np.copyto(best, cross / square, where=better)
            return self._best_rounded(x, hx, h, (largest / np.float32(self.m), best), codes, product)

    def _best_rounded(
        self,
        x: Float32,
        hx: Float32,
        h: Float32 | None,
        candidates: tuple[Float32, Float32],
        codes: Float32,
        product: Float32,
    ) -> Float32:
        """Of the reference rounding's scale, the best found, and that one refitted: the one that errs least."""
        chosen = np.zeros(x.shape[1], np.float32)
        least = np.full(x.shape[1], np.inf, np.float32)
        refitted = candidates[1]
        for scale in (*candidates, None):
            rounded = self._rounded(refitted if scale is None else scale)
            self.codes(x, rounded, codes)
            cross, square = self._sums(hx, codes, h, product)
            refitted = cross / square
            error = self._error(x, rounded, codes, h, product)
            better = error < least
            np.copyto(least, error, where=better)
            np.copyto(chosen, rounded, where=better)
        return chosen

    def _error(self, x: Float32, scale: Float32, codes: Float32, h: Float32 | None, product: Float32) -> Float32:
        """sum h (w - scale c)^2 per group: from the differences, which at 8 bits are small against the sums."""
        np.multiply(codes, scale, out=product)
        np.subtract(x, product, out=product)
        product *= product
        if h is not None:
            product *= h
        error: Float32 = np.add.reduce(product, axis=0)
        return error

    def codes(self, x: Float32, scale: Float32, codes: Float32) -> None:
        """code - m for each weight; 0 where the scale is 0."""
        np.divide(x, np.where(scale == 0, np.float32(np.inf), scale), out=codes)
        self._to_codes(codes)

    def _to_codes(self, quotients: Float32) -> None:
        np.rint(quotients, out=quotients)
        np.clip(quotients, np.float32(-self.m), np.float32(self.m + 1), out=quotients)

    def _sums(self, hx: Float32, codes: Float32, h: Float32 | None, product: Float32) -> tuple[Float32, Float32]:
        """sum h w c and sum h c^2 per group."""
        cross = np.add.reduce(np.multiply(hx, codes, out=product), axis=0)
        np.multiply(codes, codes, out=product)
        if h is not None:
            product *= h
        return cross, np.add.reduce(product, axis=0)

    def _rounded(self, scale: Float32) -> Float32:
        return floats.widen(floats.cast(scale, "float32", self.model_dtype), self.model_dtype)


def _tiled(importance: Float32, groups: int, weights: Weights) -> Float32:
    """The weights of columns as `[position, group]` for as many rows as `groups` make; 0 behind a partial group."""
    size = weights.group_size
    of_a_row = np.zeros(-(-len(importance) // size) * size, np.float32)
    mean = importance.mean(dtype=np.float64)
    of_a_row[: len(importance)] = importance / mean if mean > 0 else 1
    row = of_a_row.reshape(-1, size)
    per_word = elements_per_word(weights)
    values = np.empty((per_word, size // per_word, groups), np.float32)
    transpose(np.tile(row, (-(-groups // len(row)), 1))[:groups], "float32", values, values)
    return values.reshape(size, groups)
