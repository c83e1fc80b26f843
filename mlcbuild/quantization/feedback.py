"""Rounding with error feedback into formats with groups (Frantar et al., GPTQ, arXiv 2210.17323), and what goes on.

Of a matrix W [N, K] whose inputs have the Gram matrix H [K, K] (and a part of its mean diagonal), what errors E = W - Q
do to the outputs is the sum of e H e over the rows e of E. With H = R^T R, R upper triangular, that is |R e|^2. So the
columns can be rounded from the last to the first: what the later ones did wrong, an earlier one can make good, by the
term that R has for both. That is GPTQ, with one factorization and no inverse.

A group of columns is done at once. Given the errors of the later groups, the best that it could be without rounding is
its target. Some thirty scales (and minima, where the format has them) are tried in full: codes with feedback within the
group, then the least-squares fit of the scale to them, and again; the one with the least error stays. When all groups
are done, each is done again, with the errors of all others, `PASSES` times; new codes stay where they are better. So
the error never grows from pass to pass.

Rows do not depend on each other. Sums run in one order, in kernels that are compiled here: the bytes depend on neither
the number of threads nor the processor.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlcbuild import host
from mlcbuild.quantization import floats
from mlcbuild.quantization.floats import Array, Float32
from mlcbuild.quantization.packing import Packed
from mlcbuild.quantization.schemes import elements_per_word, max_code
from mlcbuild.recipes.types import Weights
from mlcbuild.zig import run_zig

PASSES = 3  # after the first

_SOURCE = Path(__file__).parent / "kernels" / "feedback.c"
# Fused multiplication and addition is asked for where it is wanted; nothing else may be fused or reordered.
_FLAGS = ("-shared", "-nostdlib", "-fPIC", "-O3", "-mcpu=native", "-ffp-contract=off", "-fno-math-errno")
_MODEL = {"float16": 1, "bfloat16": 2, "float32": 3}
_ROWS = 16  # of a matrix that a kernel works on at once
PANEL = 64  # rows of a triangle that are factored together


class Kernels:
    """The kernels, compiled in `folder`, and threads to run them on."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self._folder = folder
        self._formats: dict[tuple[Weights, str], Any] = {}
        self.threads = threads or max(1, len(host.processors()))
        self._pool = ThreadPoolExecutor(self.threads)
        self._common = self._compile({})

    def _compile(self, defines: dict[str, int]) -> Any:
        """Raises MlcBuildError where the compiler fails."""
        library = self._folder / f"feedback{len(list(self._folder.glob('feedback*.so')))}.so"
        arguments = [f"-D{name}={value}" for name, value in defines.items()]
        run_zig(["cc", *_FLAGS, *arguments, str(_SOURCE), "-o", str(library)], self._folder / "zig")
        return ctypes.CDLL(str(library))

    def of(self, weights: Weights, model_dtype: str) -> Any:
        """The kernel that rounds into this format."""
        key = (weights, model_dtype)
        if key not in self._formats:
            defines = {"BITS": weights.bits, "GROUP": weights.group_size, "MODEL": _MODEL[model_dtype]}
            function = self._compile({**defines, "SYMMETRIC": int(weights.symmetric)}).mlcbuild_feedback
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
            function.argtypes += [ctypes.c_void_p] * 5
            function.restype = None
            self._formats[key] = function
        return self._formats[key]

    def each(self, work: Callable[[int], None], items: Sequence[int]) -> None:
        list(self._pool.map(work, items))

    def add_products(self, out: Float32, a: Float32, b: Float32, sign: float = 1.0, upper: bool = False) -> None:
        """out [I, J] += sign * a [T, I]^T b [T, J]; with `upper`, at least where the column is no less than the row.

        J is a multiple of 16; the numbers of a row lie side by side in all three.
        """
        function = self._common.mlcbuild_products

        def part(first: int, last: int) -> None:
            rows = min(len(out), last) if upper else len(out)
            function(
                *(*_where(a), *_where(b), _long(len(a)), ctypes.c_float(sign), *_where(out)),
                *(_long(0), _long(rows), _long(first), _long(last)),
            )

        self._split(part, 0, out.shape[1])

    def triangle(self, gram: Float32, floor: float) -> Float32:
        """R [K, K] with R^T R = `gram`, of which the upper half is read; no pivot's square is below `floor`.

        What stands to the right of a gram, [K, more], becomes R^-T times that.
        """
        r = np.array(gram, np.float32, order="C")
        for a in range(0, len(r), PANEL):
            b = min(a + PANEL, len(r))
            if a:
                self.add_products(r[a:b, a:], r[:a, a:b], r[:a, a:], -1.0)
            panel = partial(self._factor, r, a, b, floor)
            panel(a, b)
            self._split(panel, b, r.shape[1])
        return np.triu(r)

    def _factor(self, r: Float32, a: int, b: int, floor: float, first: int, last: int) -> None:
        where = (*_where(r), _long(a), _long(b), _long(first), _long(last))
        self._common.mlcbuild_factor(*where, ctypes.c_float(floor))

    def _split(self, work: Callable[[int, int], None], first: int, last: int) -> None:
        """Columns [first, last), in spans that are multiples of 16, on all threads."""
        step = 16 * max(1, min(16, -(-(last - first) // (32 * self.threads))))
        self.each(lambda start: work(start, min(start + step, last)), range(first, last, step))


def _where(values: Array) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    """Where a matrix lies, and from row to row how many numbers there are."""
    return ctypes.c_void_p(values.ctypes.data), _long(values.strides[0] // values.itemsize)


_long = ctypes.c_int64


class Gram:
    """The sum z^T z of the tokens' rows z that reach a matrix; of `sums` [K, K], the upper half counts.

    Where the unquantized model's rows x are known, also `shift`, (x - z)^T z. Both are filled up with zeros to whole
    groups of `weights` and a multiple of 16.
    """

    def __init__(self, kernels: Kernels, columns: int, weights: Weights) -> None:
        unit = math.lcm(weights.group_size, _ROWS)
        size = -(-columns // unit) * unit
        self._kernels = kernels
        self.sums: Float32 = np.zeros((size, size), np.float32)
        self.shift: Float32 = np.zeros((size, size), np.float32)
        self.tokens = 0

    def add(self, z: Float32, x: Float32 | None = None) -> None:
        """Rows [tokens, K]."""
        filled = self._filled(z)
        self._kernels.add_products(self.sums, filled, filled, upper=True)
        if x is not None:
            self._kernels.add_products(self.shift, self._filled(x - z), filled)
        self.tokens += len(z)

    def _filled(self, rows: Float32) -> Float32:
        filled = np.zeros((len(rows), len(self.sums)), np.float32)
        filled[:, : rows.shape[1]] = rows
        return filled


@dataclass(frozen=True)
class Metric:
    """How errors count: H [K, K] with its damping, R with R^T R = H, and the triangles of its groups."""

    h: Float32
    r: Float32
    own: Float32  # [groups, size, size]


def metric(kernels: Kernels, gram: Float32, weights: Weights, damping: float) -> Metric:
    """Of sums as a `Gram` has them."""
    h, added = damped(gram, damping)
    size = weights.group_size
    own = [kernels.triangle(h[a : a + size, a : a + size], added) for a in range(0, len(h), size)]
    return Metric(h, kernels.triangle(h, added), np.stack(own))


def mirrored(gram: Float32) -> Float32:
    """All of a Gram matrix, of which the upper half counts."""
    return np.triu(gram) + np.triu(gram, 1).T


def damped(gram: Float32, damping: float) -> tuple[Float32, float]:
    """All of a Gram matrix, and what was added to its diagonal: a part of the mean; 1 where that is nothing."""
    h = mirrored(gram)
    diagonal = np.diag(gram)
    mean = float(diagonal.sum(dtype=np.float64)) / max(int(np.count_nonzero(diagonal)), 1)
    added = np.float32(damping * mean) or np.float32(1)
    h[np.diag_indices_from(h)] += added
    return h, float(added)


def rounded(
    kernels: Kernels, rows: Float32, by: Metric, weights: Weights, model_dtype: str, passes: int = PASSES
) -> tuple[Packed, Float32]:
    """`rows` [N, K] float32 packed, and the numbers [N, K] that this stands for."""
    function = kernels.of(weights, model_dtype)
    n, k = rows.shape
    size, groups = len(by.h), len(by.h) // weights.group_size
    codes, values = np.empty((n, size), np.uint8), np.empty((n, k), np.float32)
    grids = np.empty((2, n, groups), np.float32)
    offset = np.float32(max_code(weights) if weights.symmetric else 0)

    def block(first: int) -> None:
        mine = slice(first, first + _ROWS)
        count = min(_ROWS, n - first)
        w, found, errors = (np.zeros((size, _ROWS), np.float32) for _ in range(3))
        grid = np.zeros((2, groups, _ROWS), np.float32)
        w[:k, :count] = rows[mine].T
        for again in range(1 + passes):
            m = by.h if again else by.r
            function(
                *(m.ctypes.data, by.own.ctypes.data, size, int(again > 0), w.ctypes.data, found.ctypes.data),
                *(grid[0].ctypes.data, grid[1].ctypes.data, errors.ctypes.data),
            )
        codes[mine] = (found.T + offset)[:count]
        values[mine] = (w - errors)[:k].T[:count]
        grids[:, mine] = grid.transpose(0, 2, 1)[:, :count]

    kernels.each(block, range(0, n, _ROWS))
    return _packed(codes, grids, k, weights, model_dtype), values


def _packed(codes: Array, grids: Float32, k: int, weights: Weights, model_dtype: str) -> Packed:
    """As `group.encode` and `asymmetric.encode` do it; the tail of a partial last group is 0."""
    codes[:, k:] = 0
    groups = -(-k // weights.group_size)
    codes = codes[:, : groups * weights.group_size]
    per_word = elements_per_word(weights)
    words = np.zeros((len(codes), codes.shape[1] // per_word), weights.storage_dtype)
    for position in range(per_word):
        words |= codes[:, position::per_word].astype(words.dtype) << words.dtype.type(weights.bits * position)
    scales, minima = np.ascontiguousarray(grids[:, :, :groups])
    if weights.symmetric:
        return Packed(words, floats.cast(scales, "float32", model_dtype))
    pair = floats.cast(minima, "float32", "bfloat16").astype(np.uint32) << np.uint32(16)
    return Packed(words, pair | floats.cast(scales, "float32", "bfloat16"))
