"""The unquantized model: convert's index through a float32 library.

Parameters are widened to float32, a block at a time, into one file, which is then mapped: memory stays small however
large the model is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.quantization import floats
from mlcbuild.quantization.sources import PIECE, Piece, Sources
from mlcbuild.runtime import weights
from mlcbuild.runtime.model import Model, network
from mlcbuild.runtime.tvm_runtime import ALIGNMENT


def load_reference(library: Path, index: Mapping[str, Any], materials: Mapping[str, Path], scratch: Path) -> Model:
    """The model of `index` (convert's parameters.json) on an unquantized float32 library.

    `materials`: sha256 -> checkpoint file. `scratch` is a folder for the widened parameters; it must outlive the model.
    Raises MlcBuildError where the library wants other parameters.
    """
    records = widen(index, materials, scratch / "reference.bin")
    return Model(network(library, records, "the converted checkpoint"), {})


def widen(index: Mapping[str, Any], materials: Mapping[str, Path], path: Path) -> list[weights.Record]:
    """Write every parameter of `index` to `path` as float32, each at a 64-byte boundary; where they lie."""
    sources = Sources((part for parameter in index["parameters"] for part in parameter["parts"]), materials)
    records = []
    with path.open("wb") as file:
        for parameter in index["parameters"]:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            offset = file.tell()
            for piece in _pieces(parameter):
                file.write(floats.widen(sources.values(piece), piece.dtype).data)
                sources.release(piece)
            shape = tuple(parameter["shape"])
            nbytes = file.tell() - offset
            if nbytes != 4 * prod(shape):
                raise MlcBuildError(
                    f"parameters.json: the parts of {parameter['name']} hold {nbytes // 4} values, "
                    f"but its shape {list(shape)} takes {prod(shape)}"
                )
            records.append(weights.Record(parameter["name"], shape, "float32", "raw", path, offset, nbytes))
    return records


def _pieces(parameter: Mapping[str, Any]) -> Iterator[Piece]:
    """The parameter's numbers in order."""
    for part in parameter["parts"]:
        count = prod(part["shape"])
        for start in range(0, count, PIECE):
            yield Piece(part, parameter["dtype"], start, min(PIECE, count - start), 1, start)
