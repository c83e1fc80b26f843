"""Where the numbers of a parameter come from: pieces of mapped checkpoint files, each small enough for one task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlcbuild.checkpoints.mapped import STORAGE, MappedFile
from mlcbuild.errors import CheckpointError
from mlcbuild.quantization import floats
from mlcbuild.quantization.floats import Array, BadValue

PIECE = 1 << 21  # elements that one task reads

Part = Mapping[str, Any]  # of parameters.json: blob, file, tensor, offset, nbytes, shape


@dataclass(frozen=True)
class Piece:
    """`count` elements of dtype `dtype` from `start` within `part`; `width` is K of a packed matrix, else 1.

    `row` is the number of its first row within the parameter, whose experts' rows count one after the other.
    """

    part: Part
    dtype: str
    start: int
    count: int
    width: int
    row: int

    @property
    def nbytes(self) -> int:
        return self.count * STORAGE[self.dtype].itemsize


class Sources:
    """The checkpoint files that some parts lie in, mapped."""

    def __init__(self, parts: Iterable[Part], blobs: Mapping[str, Path]) -> None:
        """Raises CheckpointError when the content of a part is not among `blobs` (sha256 -> file)."""
        self._files: dict[str, MappedFile] = {}
        for part in parts:
            digest = part["blob"]
            if digest not in blobs:
                raise CheckpointError(
                    f"{part['file']}: the checkpoint's file is gone (sha256 {digest}); run download again"
                )
            if digest not in self._files:
                self._files[digest] = MappedFile(blobs[digest])

    def values(self, piece: Piece) -> Array:
        """The piece, flat, as floats.STORAGE holds its dtype: mapped, not copied."""
        offset = piece.part["offset"] + piece.start * STORAGE[piece.dtype].itemsize
        return self._files[piece.part["blob"]].view(offset, piece.count, piece.dtype)

    def rows(self, piece: Piece) -> Array:
        return self.values(piece).reshape(-1, piece.width)

    def raw(self, part: Part, dtype: np.dtype[Any]) -> Array:
        """A whole part in its shape, mapped: for tensors that are no floats."""
        return self._files[part["blob"]].bytes(part["offset"], part["nbytes"]).view(dtype).reshape(part["shape"])

    def release(self, piece: Piece) -> None:
        """Drop the piece's pages from this process's memory."""
        offset = piece.part["offset"] + piece.start * STORAGE[piece.dtype].itemsize
        self._files[piece.part["blob"]].release(offset, piece.nbytes)

    def release_part(self, part: Part) -> None:
        self._files[part["blob"]].release(part["offset"], part["nbytes"])

    def explain(self, name: str, piece: Piece, bad: BadValue) -> str:
        """What is wrong with a value of parameter `name`, as a message."""
        value = floats.widen(self.values(piece)[bad.index : bad.index + 1], piece.dtype)[0]
        position = ", ".join(str(axis) for axis in np.unravel_index(piece.start + bad.index, piece.part["shape"]))
        where = f"{piece.part['file']}: tensor {piece.part['tensor']} (parameter {name})"
        if np.isnan(value):
            return f"{where}: NaN at [{position}]; the checkpoint is damaged"
        if np.isinf(value):
            return f"{where}: {'-' if value < 0 else ''}Inf at [{position}]; the checkpoint is damaged"
        return (
            f"{where}: {value:g} at [{position}] is too large for {bad.dtype}; "
            "use a quantization whose model_dtype is float32"
            + (", with symmetric weights" if bad.dtype == "bfloat16" else "")
        )


def pieces(entry: Mapping[str, Any], packed: bool) -> tuple[Piece, ...]:
    """A parameter of parameters.json in order; pieces of packed matrices are whole rows, of one matrix each."""
    width = entry["shape"][-1] if packed else 1
    step = max(1, PIECE // width) * width
    made = []
    row = 0
    for part in entry["parts"]:
        size = prod(part["shape"])
        each = prod(part["shape"][-2:]) if packed else size  # of an expert, where the part is of all of them
        for begin in range(0, size, each or 1):
            for start in range(begin, begin + each, step):
                count = min(step, begin + each - start)
                made.append(Piece(part, entry["dtype"], start, count, width, row + start // width))
        row += size // width
    return tuple(made)
