"""Checkpoints of BitNet b1.58 (Ma et al., arXiv 2402.17764), whose matrices have three values: -s, 0 and s.

packed   `x.weight` [N / 4, K] U8: its row r holds the rows r, r + N / 4, r + 2 N / 4 and r + 3 N / 4 of the matrix, two
         bits of each number to each, the first lowest; 0, 1 and 2 are -1, 0 and 1. `x.weight_scale` is s, or 1 / s
online   `x.weight` [N, K], of which the matrix is made: s is the mean of all magnitudes, a value w round(w / s) s, of
         which no more than s is left

So transformers' integrations/bitnet.py has them. Values are float32; that of a packed matrix is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.checkpoints.computed import Computed, row_pieces
from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.mapped import FLOATS, MappedFile, view
from mlcbuild.errors import CheckpointError
from mlcbuild.merging.prequantized import Scheme
from mlcbuild.quantization import floats

Array = npt.NDArray[Any]
_LEAST = np.float32(1e-5)  # of a mean that is divided by


def find(
    name: str, table: Mapping[str, TensorRef], scheme: Scheme, problems: list[str]
) -> tuple[Computed, tuple[str, ...]] | None:
    """The matrix `name` as floats, and the tensors that it is made of; None for another tensor."""
    ref = table[name]
    if not name.endswith("_proj.weight") or (ref.dtype == "U8") == scheme.online:
        return None
    if scheme.online and ref.dtype not in FLOATS:
        problems.append(f"{ref.file}: tensor {name}: dtype {ref.dtype}, expected {', '.join(FLOATS)}")
        return None
    if scheme.online:
        return _made(name, ref.shape, partial(_rounded, ref)), (name,)
    scale = table.get(f"{name}_scale")
    if scale is None or len(ref.shape) != 2 or prod(scale.shape) != 1 or scale.dtype not in FLOATS:
        problems.append(f"{ref.file}: tensor {name}: there is no {name}_scale beside it that is one float")
        return None
    rows, columns = ref.shape
    return _made(name, (4 * rows, columns), partial(_unpacked, ref, scale, scheme.divides)), (name, scale.name)


def _made(name: str, shape: tuple[int, ...], pieces: Any) -> Computed:
    return Computed(TensorRef(name, "", "", Path(), 0, 4 * prod(shape), "F32", shape), pieces)


def _unpacked(ref: TensorRef, scale: TensorRef, divides: bool) -> Iterator[Array]:
    words = MappedFile(ref.path).bytes(ref.offset, ref.nbytes).reshape(ref.shape)
    (factor,) = _wide(scale).ravel()
    if not np.isfinite(factor) or factor == 0:
        raise CheckpointError(f"{scale.file}: tensor {scale.name}: {factor}; the checkpoint is damaged")
    values = np.arange(-1, 3, dtype=np.float32)
    values = values / factor if divides else values * factor
    for shift in (0, 2, 4, 6):
        for piece in row_pieces(ref.shape):
            codes = words[piece] >> shift & 3
            if (codes == 3).any():
                raise CheckpointError(f"{ref.file}: tensor {ref.name}: a number of none of three values; it is damaged")
            yield values[codes]


def _rounded(ref: TensorRef) -> Iterator[Array]:
    total = sum(float(np.abs(_wide(ref, piece)).sum(dtype=np.float64)) for piece in row_pieces(ref.shape))
    scale = np.float32(1) / np.maximum(np.float32(total / prod(ref.shape)), _LEAST)
    for piece in row_pieces(ref.shape):
        yield np.clip(np.rint(_wide(ref, piece) * scale), -1, 1) / scale


def _wide(ref: TensorRef, piece: Any = slice(None)) -> Array:
    return floats.widen(np.atleast_1d(view(ref))[piece], FLOATS[ref.dtype][0])
