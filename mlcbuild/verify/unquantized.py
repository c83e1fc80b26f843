"""A checkpoint's numbers under the model's parameter names, as float32, as few at a time as are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.quantization import floats
from mlcbuild.quantization.sources import PIECE, Piece, Sources
from mlcbuild.runtime import tvm_runtime

Float32 = npt.NDArray[np.float32]


class Unquantized:
    """The parameters that `document` (parameters.json) lists. Files are mapped, and given back once read."""

    def __init__(self, document: Mapping[str, Any], blobs: Mapping[str, Path]) -> None:
        """`blobs`: sha256 -> file. Raises CheckpointError when one that is needed is not there."""
        self._entries = {entry["name"]: entry for entry in document["parameters"]}
        self._sources = Sources((part for entry in document["parameters"] for part in entry["parts"]), blobs)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """Rows `start` to `stop` of a parameter, at a 64-byte boundary; all of them by default.

        Those of experts [experts, N, K] count one after the other.
        """
        shape = self._entries[name]["shape"]
        row = shape[-1:] if len(shape) > 1 else []
        rows = prod(shape) // prod(row)
        end = rows if stop is None else min(stop, rows)
        found = tvm_runtime.aligned_empty((end - start, *row), np.float32)
        for piece in self._pieces(name, start, end):
            values = floats.widen(self._sources.values(piece), piece.dtype)
            first = piece.row - start
            found[first : first + piece.count // piece.width] = values.reshape(-1, *row)
            self._sources.release(piece)
        return found

    def take(self, name: str, rows: Sequence[int]) -> Float32:
        """These rows of a parameter, at a 64-byte boundary."""
        found = tvm_runtime.aligned_empty((len(rows), *self._entries[name]["shape"][1:]), np.float32)
        for at, row in enumerate(rows):
            found[at] = self.rows(name, row, row + 1)[0]
        return found

    def _pieces(self, name: str, start: int, stop: int) -> Iterator[Piece]:
        entry = self._entries[name]
        width = entry["shape"][-1] if len(entry["shape"]) > 1 else 1
        step = max(1, PIECE // width)
        row = 0
        for part in entry["parts"]:
            end = row + prod(part["shape"]) // width
            for first in range(max(start, row), min(stop, end), step):
                count = min(first + step, stop, end) - first
                yield Piece(part, entry["dtype"], (first - row) * width, count * width, width, first)
            row = end
