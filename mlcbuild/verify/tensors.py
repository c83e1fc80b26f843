"""A checkpoint's tensors as float32, as few numbers at a time as are asked for, by the pieces that use them.

And the beginning of each way of a text through the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import BEGINNING, EMBED, FINAL_NORM, Parameter, parameters
from mlcbuild.models.structure import Structure
from mlcbuild.quantization import floats
from mlcbuild.quantization.sources import PIECE, Piece, Sources
from mlcbuild.runtime import tvm_runtime
from mlcbuild.verify.pieces import Float32, Pieces

Windows = Sequence[Sequence[int]]  # token ids of each


@dataclass(frozen=True)
class PieceParameters:
    """A model's parameters by where they are used, and the kind of each layer; `writes`: not one of texts' vectors."""

    parameters: Sequence[Parameter]
    kinds: Sequence[int]
    writes: bool

    @property
    def layers(self) -> int:
        return len(self.kinds)

    def layer(self, number: int) -> list[Parameter]:
        return [p for p in self.parameters if p.layer == number]

    @property
    def embedding(self) -> list[Parameter]:
        return self._of(EMBED)

    @property
    def beginning(self) -> list[Parameter]:
        return self._of(BEGINNING)

    @property
    def norm(self) -> list[Parameter]:
        return self._of(FINAL_NORM)

    @property
    def head(self) -> list[Parameter]:
        """What makes logits: a matrix, for which a tied model has none of its own, and a bias where there is one.

        Nothing in a model of texts.
        """
        if not self.writes:
            return []
        return [*(self._of(("lm_head",)) or self.embedding), *self._of(("lm_head_bias", "lm_head_scale"))]

    def _of(self, roles: Sequence[str]) -> list[Parameter]:
        return [p for p in self.parameters if p.role in roles]


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

    def rows_of(self, parameter: Parameter, start: int, stop: int) -> Float32:
        return self.rows(parameter.name, start, stop)

    def take(self, name: str, rows: Sequence[int]) -> Float32:
        """These rows of a matrix, or of experts one after the other, at a 64-byte boundary."""
        found = tvm_runtime.aligned_empty((len(rows), self._entries[name]["shape"][-1]), np.float32)
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


def by_piece(structure: Structure) -> PieceParameters:
    return PieceParameters(parameters(structure), structure.layer_kinds, structure.embedding is None)


def widened(wanted: Sequence[Parameter], checkpoint: Unquantized) -> list[Any]:
    """What a float32 library takes for these parameters."""
    return [tvm_runtime.tensor(checkpoint.rows(each.name).reshape(each.shape)) for each in wanted]


def embedded(model: PieceParameters, pieces: Pieces, checkpoint: Unquantized, windows: Windows) -> list[Float32]:
    """The unquantized model's first hidden states of each window. Raises MlcBuildError as `begun` does."""

    def take(embedding: Parameter, rows: Sequence[int]) -> Float32:
        return checkpoint.take(embedding.name, rows)

    return begun(model, pieces, take, widened(model.beginning, checkpoint), windows)


def begun(
    model: PieceParameters,
    pieces: Pieces,
    take: Callable[[Parameter, Sequence[int]], Float32],
    beginning: Sequence[Any],
    windows: Windows,
) -> list[Float32]:
    """First hidden states of each window. Of the embedding, `take` is asked for the rows that occur: sorted, [N, H].

    Raises MlcBuildError for a token that has no row, and for a text without windows.
    """
    if not windows:
        raise MlcBuildError("the text has no document of two tokens or more: nothing to run the model on")
    (embedding,) = model.embedding
    used = np.unique(np.concatenate([np.asarray(ids, np.int64) for ids in windows]))
    wrong = used[(used < 0) | (used >= embedding.shape[0])]
    if len(wrong):
        raise MlcBuildError(f"token id {wrong[0]} is not in this model's vocabulary of {embedding.shape[0]}")
    table = [tvm_runtime.tensor(take(embedding, used.tolist()))]
    return [pieces.begin(pieces.embed(np.searchsorted(used, ids).tolist(), table), beginning) for ids in windows]
