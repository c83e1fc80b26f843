"""A weights folder, `params_shard_N.bin` and `tensor-cache.json`: written, and read back strictly for checks.

Writing is sequential and streaming: a tensor is announced with its size, its bytes then arrive in pieces of any length
and are written and hashed as they come. Tensors start at multiples of 64 bytes, so that a runtime can map a shard and
use the tensors in place (TVM assumes 64-byte alignment).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from mlcbuild.errors import MlcBuildError
from mlcbuild.quantization import floats
from mlcbuild.quantization.floats import Array

SHARD_BYTES = 32 * 1024 * 1024  # a larger tensor gets a shard of its own
ALIGNMENT = 64
INDEX = "tensor-cache.json"

_STORAGE = {name: np.dtype(name) for name in ("uint32", "uint16", "uint8", "int8")} | floats.STORAGE


@dataclass(frozen=True)
class Announced:
    """A tensor about to be written. `format` is `raw`, or `f32-to-bf16`: the upper halves of float32 values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: str = "raw"

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * (2 if self.format == "f32-to-bf16" else _STORAGE[self.dtype].itemsize)


class Writer:
    """Writes one weights folder. Use as a context manager; `finish` writes the index.

    A folder without `tensor-cache.json` is unfinished.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._shards: list[dict[str, Any]] = []
        self._names: set[str] = set()
        self._file: BinaryIO | None = None
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._records: list[dict[str, Any]] = []
        self._position = 0  # in the open shard
        self._due = 0  # bytes of the announced tensor that have not arrived
        self._bytes = 0  # of all tensors, as a device holds them

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def begin(self, tensor: Announced) -> None:
        """The bytes that follow are this tensor's. Raises MlcBuildError when its name was used before."""
        self._check_complete()
        if tensor.name in self._names:
            raise MlcBuildError(f"{self._folder}: tensor {tensor.name} is written twice")
        self._names.add(tensor.name)
        offset = -(-self._position // ALIGNMENT) * ALIGNMENT
        if self._file is not None and offset + tensor.nbytes > self._shard_bytes:
            self._close_shard()
            offset = 0
        if self._file is None:
            # Unbuffered: pieces are large, and are hashed from the same memory that is written.
            self._file = (self._folder / f"params_shard_{len(self._shards)}.bin").open("wb", buffering=0)
        self._put(bytes(offset - self._position))
        self._due = tensor.nbytes
        self._bytes += prod(tensor.shape) * _STORAGE[tensor.dtype].itemsize
        self._records.append(
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "dtype": tensor.dtype,
                "format": tensor.format,
                "nbytes": tensor.nbytes,
                "byteOffset": offset,
            }
        )

    def write(self, piece: Array) -> None:
        """The announced tensor's next bytes, from a C-contiguous array."""
        data = piece.reshape(-1).view(np.uint8).data
        if len(data) > self._due:
            raise ValueError(f"{self._records[-1]['name']}: {len(data)} bytes, {self._due} were due")
        self._due -= len(data)
        self._put(data)

    def finish(self, original_parameters: int) -> None:
        """Close the last shard and write the index. `original_parameters` counts the unquantized model's numbers."""
        self._check_complete()
        if self._file is not None:
            self._close_shard()
        metadata = {
            "ParamSize": len(self._names),
            "ParamBytes": self._bytes,
            "BitsPerParam": self._bytes * 8 / original_parameters,
        }
        write_index(self._folder / INDEX, metadata, self._shards)

    def _put(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        self._md5.update(data)
        self._position += len(data)
        rest = memoryview(data)
        while rest:  # an unbuffered write may stop short
            rest = rest[self._file.write(rest) :]

    def _close_shard(self) -> None:
        assert self._file is not None
        self._file.close()
        self._shards.append(
            {
                "dataPath": f"params_shard_{len(self._shards)}.bin",
                "format": "raw-shard",
                "nbytes": self._position,
                "md5sum": self._md5.hexdigest(),
                "records": self._records,
            }
        )
        self._file = None
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._records = []
        self._position = 0

    def _check_complete(self) -> None:
        if self._due:
            raise ValueError(f"{self._records[-1]['name']}: {self._due} bytes have not arrived")


def write_index(path: Path, metadata: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> None:
    """Write `tensor-cache.json`; the same content always gives the same bytes."""
    path.write_text(json.dumps({"metadata": metadata, "records": shards}, indent=2) + "\n", encoding="utf-8")


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


def read_tensors(folder: Path) -> Iterator[tuple[str, Array]]:
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


def _tensor(record: dict[str, Any], data: Array, path: Path) -> Array:
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
