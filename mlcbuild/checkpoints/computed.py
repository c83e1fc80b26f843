"""Tensors that no file has as they are needed, and that are computed: merged, or laid out row by row.

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
from mlcbuild.checkpoints.mapped import FLOATS, view

FILE_BYTES = 4 << 30  # a file is closed once it has this many bytes
PIECE = 1 << 18  # elements that are worked on at once: their float32 values fit in a core's cache
_ALIGNMENT = 64


@dataclass(frozen=True)
class Computed:
    """A tensor and how it is computed: its rows in order, in pieces, of `target`'s dtype (bfloat16 as uint16)."""

    target: TensorRef
    pieces: Callable[[], Iterator[npt.NDArray[Any]]]


def row_pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of axis 0 that together are all of it, each of about PIECE elements and at least one row."""
    rows = shape[0] if shape else 1
    step = max(1, PIECE // max(1, prod(shape[1:])))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def strided(table: Mapping[str, TensorRef], needed: Collection[str]) -> list[Computed]:
    """The needed tensors that lie in their file in another order than row by row."""
    return [
        Computed(ref, partial(_rows, ref))
        for name, ref in table.items()
        if ref.strides is not None and name in needed and ref.dtype in FLOATS
    ]


def place(computed: Iterable[Computed]) -> list[Computed]:
    """The same with `target` saying where in which file of the convert step they will be."""
    placed: list[Computed] = []
    number, end = 0, 0
    for each in computed:
        if end >= FILE_BYTES:
            number, end = number + 1, 0
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        file = f"tensors-{number}.bin"
        target = replace(each.target, file=file, blob="", path=Path(file), offset=offset, strides=None)
        end = offset + target.nbytes
        placed.append(replace(each, target=target))
    return placed


def write(
    computed: Iterable[Computed], folder: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, TensorRef]:
    """Compute the placed tensors; what they then are, by name, with the sha256 of their files as `blob`."""
    by_file: dict[str, list[Computed]] = {}
    for each in computed:
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


def exchanged(
    table: Mapping[str, TensorRef], made: Iterable[Computed], used: Collection[str]
) -> tuple[dict[str, TensorRef], list[Computed]]:
    """The table with what is made in the place of what it is made of (`used`), and that with its places in files."""
    placed = place(made)
    plain = {name: ref for name, ref in table.items() if name not in used}
    return plain | {each.target.name: each.target for each in placed}, placed
