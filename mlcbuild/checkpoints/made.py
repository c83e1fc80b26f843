"""Tensors that no file has as they are needed, and that are made: merged, or laid out row by row.

They are placed one after the other in files `tensors-N.bin` of the convert step, and written piece by piece, so that
memory does not grow with the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.mapped import FLOATS, MappedFile

FILE_BYTES = 4 << 30  # a file is closed once it has this many bytes
PIECE = 1 << 18  # elements that are worked on at once: their float32 values fit in a core's cache
_ALIGNMENT = 64


@dataclass(frozen=True)
class Made:
    """A tensor and how it is made: its rows in order, in pieces, of `target`'s dtype (bfloat16 as uint16)."""

    target: TensorRef
    pieces: Callable[[], Iterator[npt.NDArray[Any]]]


def row_pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of axis 0 that together are all of it, each of about PIECE elements and at least one row."""
    rows = shape[0] if shape else 1
    step = max(1, PIECE // max(1, prod(shape[1:])))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def strided(table: Mapping[str, TensorRef], needed: Collection[str]) -> list[Made]:
    """The needed tensors that lie in their file in another order than row by row."""
    return [
        Made(ref, partial(_rows, ref))
        for name, ref in table.items()
        if ref.strides is not None and name in needed and ref.dtype in FLOATS
    ]


def view(ref: TensorRef) -> npt.NDArray[Any]:
    """The tensor as a mapped array of its shape, whatever its order; bfloat16 as uint16. Its dtype is of FLOATS."""
    dtype, storage = FLOATS[ref.dtype]
    if ref.strides is None or not ref.nbytes:
        return MappedFile(ref.path).view(ref.offset, ref.nbytes // storage.itemsize, dtype).reshape(ref.shape)
    last = sum((size - 1) * stride for size, stride in zip(ref.shape, ref.strides, strict=True))
    flat = MappedFile(ref.path).view(ref.offset, last + 1, dtype)
    strides = [stride * storage.itemsize for stride in ref.strides]
    return np.lib.stride_tricks.as_strided(flat, ref.shape, strides, writeable=False)


def place(made: Iterable[Made]) -> list[Made]:
    """The same with `target` saying where in which file of the convert step they will be."""
    placed: list[Made] = []
    number, end = 0, 0
    for each in made:
        if end >= FILE_BYTES:
            number, end = number + 1, 0
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        file = f"tensors-{number}.bin"
        target = replace(each.target, file=file, blob="", path=Path(file), offset=offset, strides=None)
        end = offset + target.nbytes
        placed.append(replace(each, target=target))
    return placed


def write(
    made: Iterable[Made], folder: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, TensorRef]:
    """Make the placed tensors; what they then are, by name, with the sha256 of their files as `blob`."""
    by_file: dict[str, list[Made]] = {}
    for each in made:
        by_file.setdefault(each.target.file, []).append(each)
    total = sum(each.target.nbytes for group in by_file.values() for each in group)
    done = 0
    written = {}
    for name, group in by_file.items():
        digest = hashlib.sha256()
        with (folder / name).open("wb") as file:
            for each in group:
                padding = bytes(each.target.offset - file.tell())
                file.write(padding)
                digest.update(padding)
                for piece in each.pieces():
                    data = np.ascontiguousarray(piece).data.cast("B") if piece.size else b""
                    file.write(data)
                    digest.update(data)
                    done += piece.nbytes
                    progress(done, total)
        for each in group:
            written[each.target.name] = replace(each.target, blob=digest.hexdigest(), path=folder / name)
    return written


def _rows(ref: TensorRef) -> Iterator[npt.NDArray[Any]]:
    whole = view(ref)
    if not ref.shape:
        yield whole
        return
    for rows in row_pieces(ref.shape):
        yield whole[rows]
