"""Reading a weights folder back, strictly: for checks and comparisons, not for running a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError
from mlcbuild.quantization import floats
from mlcbuild.quantization.tensor_cache import INDEX, ITEM_BYTES

_STORAGE = {name: floats.STORAGE.get(name, np.dtype(name if name != "bfloat16" else "u2")) for name in ITEM_BYTES}


def read_index(folder: Path) -> dict[str, Any]:
    """`tensor-cache.json`. Raises MlcBuildError when it is absent or not JSON."""
    path = folder / INDEX
    if not path.is_file():
        raise MlcBuildError(f"{path}: missing: {folder} is no finished weights folder")
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MlcBuildError(f"{path}: not valid JSON: {error}") from None
    return document


def read_tensors(folder: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """(name, array) for every tensor in file order; bfloat16 as uint16, `f32-to-bf16` widened to float32.

    One shard is in memory at a time. Raises MlcBuildError for a shard that is missing, outside the folder, of another
    length or md5 than the index says, and for a record that does not fit its shard or its own shape.
    """
    for shard in read_index(folder)["records"]:
        name = shard["dataPath"]
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise MlcBuildError(f"{folder / INDEX}: shard {name!r} lies outside the folder")
        if not path.is_file():
            raise MlcBuildError(f"{path}: missing")
        data = np.fromfile(path, np.uint8)
        if len(data) != shard["nbytes"]:
            what = "truncated" if len(data) < shard["nbytes"] else "too long"
            raise MlcBuildError(f"{path}: {what}: {len(data)} bytes, {INDEX} says {shard['nbytes']}")
        digest = hashlib.md5(data.data, usedforsecurity=False).hexdigest()
        if digest != shard["md5sum"]:
            raise MlcBuildError(f"{path}: damaged: its md5 is {digest}, {INDEX} says {shard['md5sum']}")
        for record in shard["records"]:
            yield record["name"], _tensor(record, data, path)


def _tensor(record: dict[str, Any], data: npt.NDArray[np.uint8], path: Path) -> npt.NDArray[Any]:
    short = record["format"] == "f32-to-bf16" and record["dtype"] == "float32"
    storage = floats.STORAGE["bfloat16"] if short else _STORAGE.get(record["dtype"])
    if storage is None:
        raise MlcBuildError(f"{path}: tensor {record['name']}: unknown dtype {record['dtype']!r}")
    start, nbytes, shape = record["byteOffset"], record["nbytes"], record["shape"]
    if nbytes != prod(shape) * storage.itemsize or start + nbytes > len(data):
        raise MlcBuildError(
            f"{path}: tensor {record['name']}: {nbytes} bytes at {start} do not fit its shape {shape} or the shard"
        )
    values = data[start : start + nbytes].view(storage).reshape(shape)
    return floats.widen(values, "bfloat16") if short else values
