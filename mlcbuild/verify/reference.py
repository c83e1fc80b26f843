"""The unquantized model: convert's index through a float32 library.

Parameters are widened to float32, a block at a time, into one file, which is then mapped: memory stays small however
large the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import threads, weights
from mlcbuild.runtime.library import Library, Network, match
from mlcbuild.runtime.model import Model
from mlcbuild.runtime.tvm_runtime import ALIGNMENT

_STORED = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "float64": "float64"}
_BLOCK = 1 << 22  # values that are widened at once


def load_reference(
    library: Path,
    index: Mapping[str, Any],
    blob_path: Callable[[str, str], Path],
    scratch: Path,
    config: Mapping[str, Any] | None = None,
    thread_count: int | None = None,
) -> Model:
    """The model of `index` (convert's parameters.json) on an unquantized float32 library.

    `blob_path(digest, file)` finds the checkpoint file that a part lies in. `scratch` is a folder for the widened
    parameters; it must outlive the model. Raises MlcBuildError where the library wants other parameters.
    """
    import tvm_ffi

    count = threads.configure(threads.choose(thread_count))
    opened = Library(library)
    records = widen(index, blob_path, scratch / "reference.bin")
    sizes = match(opened.metadata.parameters, records, library, "the converted checkpoint")
    by_name = {record.name: record for record in records}
    tensors = list(weights.load([by_name[parameter.name] for parameter in opened.metadata.parameters]))
    vocab_size = sizes.get("vocab_size", (config or {}).get("vocab_size"))
    if not isinstance(vocab_size, int):
        raise MlcBuildError(f"{library}: its parameters do not tell the vocabulary's size")
    return Model(Network(opened, tvm_ffi.convert(tensors), vocab_size, count), config or {})


def widen(index: Mapping[str, Any], blob_path: Callable[[str, str], Path], path: Path) -> list[weights.Record]:
    """Write every parameter of `index` to `path` as float32, each at a 64-byte boundary; where they lie."""
    records = []
    with path.open("wb") as file:
        for parameter in index["parameters"]:
            offset = _pad(file)
            for values in _parts(parameter, blob_path):
                file.write(values.data)
            shape = tuple(parameter["shape"])
            nbytes = file.tell() - offset
            if nbytes != 4 * prod(shape):
                raise MlcBuildError(
                    f"parameters.json: the parts of {parameter['name']} hold {nbytes // 4} values, "
                    f"but its shape {list(shape)} takes {prod(shape)}"
                )
            records.append(weights.Record(parameter["name"], shape, "float32", "raw", path, offset, nbytes))
    return records


def _parts(parameter: Mapping[str, Any], blob_path: Callable[[str, str], Path]) -> Iterator[npt.NDArray[np.float32]]:
    """The parameter's values in order, as float32 [n]."""
    dtype = parameter["dtype"]
    if dtype not in _STORED:
        raise MlcBuildError(f"parameters.json: {parameter['name']} has dtype {dtype}; known are {', '.join(_STORED)}")
    for part in parameter["parts"]:
        source = blob_path(part["blob"], part["file"])
        raw = np.memmap(source, _STORED[dtype], "r", part["offset"], (prod(part["shape"]),))
        for block in (raw[start : start + _BLOCK] for start in range(0, len(raw), _BLOCK)):
            yield weights.widen_bf16(block) if dtype == "bfloat16" else np.ascontiguousarray(block, np.float32)


def _pad(file: BinaryIO) -> int:
    """Move to the next boundary; its offset."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    return file.tell()
