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
from mlcbuild.runtime import threads, weights
from mlcbuild.runtime.library import Library, Network, match
from mlcbuild.runtime.model import Model
from mlcbuild.runtime.tvm_runtime import ALIGNMENT


def load_reference(
    library: Path,
    index: Mapping[str, Any],
    materials: Mapping[str, Path],
    scratch: Path,
    config: Mapping[str, Any] | None = None,
    thread_count: int | None = None,
) -> Model:
    """The model of `index` (convert's parameters.json) on an unquantized float32 library.

    `materials`: sha256 -> checkpoint file. `scratch` is a folder for the widened parameters; it must outlive the model.
    Raises MlcBuildError where the library wants other parameters.
    """
    import tvm_ffi

    count = threads.configure(threads.choose(thread_count))
    opened = Library(library)
    records = widen(index, materials, scratch / "reference.bin")
    sizes = match(opened.metadata.parameters, records, library, "the converted checkpoint")
    by_name = {record.name: record for record in records}
    tensors = list(weights.load([by_name[parameter.name] for parameter in opened.metadata.parameters]))
    vocab_size = sizes.get("vocab_size", (config or {}).get("vocab_size"))
    if not isinstance(vocab_size, int):
        raise MlcBuildError(f"{library}: its parameters do not tell the vocabulary's size")
    return Model(Network(opened, tvm_ffi.convert(tensors), vocab_size, count), config or {})


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
