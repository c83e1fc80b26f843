"""Tiny llamas with everything that goes through them layer by layer: libraries of pieces, checkpoints, packages."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.models.parameters import parameters
from mlcbuild.models.structure import Structure
from mlcbuild.quantization.stream import quantize
from mlcbuild.verify.pieces import Pieces
from mlcbuild.verify.tensors import Unquantized
from tests.support import llama

WINDOWS = [list(range(5, 300)), [7, 8, 9, 3, 1], [300, 2, 4, 301, 12, 12, 12, 80] * 12]


@dataclass(frozen=True)
class Case:
    """A model as transformers has it, and its checkpoint as convert describes it."""

    model: Any
    structure: Structure
    document: dict[str, Any]
    blobs: dict[str, Path]
    folder: Path

    @property
    def checkpoint(self) -> Unquantized:
        return Unquantized(self.document, self.blobs)

    def blocks(self, quantization: str) -> Pieces:
        """The pieces, compiled in this process once."""
        path = self.folder / f"blocks-{quantization}" / "model.so"
        return Pieces(path if path.exists() else build_blocks(self.structure, quantization, path.parent))

    def package(self, quantization: str) -> Path:
        """A folder of quantized weights."""
        folder = self.folder / f"weights-{quantization}"
        if not folder.exists():
            folder.mkdir()
            known = parameters(self.structure)
            quantize(self.document, self.blobs, known, llama.QUANTIZATIONS[quantization], folder)
        return folder


def build_blocks(structure: Structure, quantization: str, folder: Path) -> Path:
    return llama.build_library(structure, quantization, folder, blocks=True)


def make_case(folder: Path, **changes: Any) -> Case:
    """The parameters lie in one file, one after the other, float32, those that MLC joins as two parts."""
    model = llama.transformers_llama(**changes)
    structure = llama.structure_of(model)
    values, data = llama.mlc_parameters(model), bytearray()
    entries: list[dict[str, Any]] = []
    for parameter in parameters(structure):
        parts = []
        for piece in np.array_split(values[parameter.name], len(parameter.sources)):
            parts.append(
                {"file": "f", "tensor": "t", "offset": len(data), "nbytes": piece.nbytes, "shape": piece.shape}
            )
            data += np.ascontiguousarray(piece).tobytes()
        entries.append({"name": parameter.name, "shape": parameter.shape, "dtype": "float32", "parts": parts})
    path = folder / "checkpoint.bin"
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    for entry in entries:
        for part in entry["parts"]:
            part["blob"] = digest
    return Case(model, structure, {"version": 1, "parameters": entries}, {digest: path}, folder)


@pytest.fixture(scope="session", params=["untied", "tied"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Three layers; heads of 24 numbers, so that inputs of o_proj are wider than the hidden state."""
    tied = request.param == "tied"
    return make_case(
        tmp_path_factory.mktemp(request.param),
        num_hidden_layers=3,
        head_dim=24,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.05,
    )
