"""A weights folder, memory-mapped: `tensor-cache.json` and its shards as tensors that a library can read.

Nothing is copied where a tensor starts at a 64-byte boundary of its file, as ours do; the operating system pages
weights in when a kernel first reads them. Other tensors (mlc-ai's older folders have some) and `f32-to-bf16` records
are loaded.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlcbuild import host
from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import tvm_runtime

if TYPE_CHECKING:
    import tvm_ffi

INDEX_NAMES = ("tensor-cache.json", "ndarray-cache.json")  # the second is the older name of the same file
_CARRIERS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}  # NumPy has none of these


@dataclass(frozen=True)
class Record:
    """One tensor of a shard. `dtype` is what the library takes; `format` says how the bytes encode it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: str
    shard: Path
    offset: int
    nbytes: int


def read_index(folder: Path) -> list[Record]:
    """The tensors of a weights folder, in file order.

    Raises MlcBuildError for a folder without an index, a shard that is missing or shorter than its index says, a
    shard outside the folder, a name that occurs twice, and a record whose size does not fit its shape.
    """
    path = next((folder / name for name in INDEX_NAMES if (folder / name).is_file()), None)
    if path is None:
        raise MlcBuildError(f"{folder}: no {' or '.join(INDEX_NAMES)}; a weights folder has one beside its shards")
    try:
        shards = json.loads(path.read_text())["records"]
        records = [_record(folder, shard, record) for shard in shards for record in shard["records"]]
    except (ValueError, KeyError, TypeError) as error:
        raise MlcBuildError(f"{path}: not a tensor cache index ({error!r})") from error
    _check_shards(folder, shards)
    seen: set[str] = set()
    for record in records:
        if record.name in seen:
            raise MlcBuildError(f"{path}: tensor {record.name} is recorded twice")
        seen.add(record.name)
    return records


def load(records: Sequence[Record]) -> Iterator[tvm_ffi.Tensor]:
    """The tensors of `records`, each shard mapped once."""
    maps: dict[Path, mmap.mmap] = {}
    for record in records:
        if record.shard not in maps:
            maps[record.shard] = map_file(record.shard)
        yield _tensor(record, maps[record.shard])


def map_file(path: Path) -> mmap.mmap:
    """A private map of a whole file.

    Copy-on-write, although nothing is written: DLPack refuses to pass read-only memory on. Where the system can read
    files into huge pages, what is not in memory yet comes in those: decoding is 4 % faster (docs/performance.md).
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        host.advise(mapped, "MADV_HUGEPAGE")
    return mapped


def widen_bf16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bfloat16 bit patterns as float32: the same 16 bits in front of 16 zeros."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def array(record: Record) -> npt.NDArray[Any]:
    """The record's numbers, mapped; bfloat16 as its bits, `f32-to-bf16` widened."""
    return _array(record, map_file(record.shard))


def _array(record: Record, mapped: mmap.mmap) -> npt.NDArray[Any]:
    stored = _stored_dtype(record.dtype, record.format)
    raw = np.frombuffer(mapped, stored, prod(record.shape), record.offset).reshape(record.shape)
    return widen_bf16(raw) if record.format == "f32-to-bf16" and record.dtype == "float32" else raw


def _tensor(record: Record, mapped: mmap.mmap) -> tvm_ffi.Tensor:
    """The record's tensor: on the map itself unless it must be decoded or moved."""
    values = _array(record, mapped)
    tensor = tvm_runtime.tensor(values)
    return tensor if str(values.dtype) == record.dtype else tvm_runtime.view(tensor, record.shape, record.dtype)


def _stored_dtype(dtype: str, encoding: str) -> str:
    """The NumPy dtype that carries the bytes."""
    return "uint16" if (encoding, dtype) == ("f32-to-bf16", "float32") else _CARRIERS.get(dtype, dtype)


def _record(folder: Path, shard: Mapping[str, Any], record: Mapping[str, Any]) -> Record:
    name, shape, dtype = record["name"], tuple(record["shape"]), record["dtype"]
    encoding = record["format"]
    if encoding not in ("raw", "f32-to-bf16"):
        raise MlcBuildError(f"{folder}: tensor {name} has format {encoding!r}; known are raw and f32-to-bf16")
    wanted = prod(shape) * np.dtype(_stored_dtype(dtype, encoding)).itemsize
    if record["nbytes"] != wanted:
        raise MlcBuildError(
            f"{folder}: tensor {name} has {record['nbytes']} bytes, "
            f"but {list(shape)} {dtype} ({encoding}) takes {wanted}"
        )
    if record["byteOffset"] + wanted > shard["nbytes"]:
        raise MlcBuildError(f"{folder}: tensor {name} ends behind its shard {shard['dataPath']}")
    return Record(name, shape, dtype, encoding, folder / shard["dataPath"], record["byteOffset"], wanted)


def _check_shards(folder: Path, shards: Sequence[Mapping[str, Any]]) -> None:
    for shard in shards:
        path = folder / shard["dataPath"]
        if Path(shard["dataPath"]).name != shard["dataPath"]:
            raise MlcBuildError(f"{folder}: shard {shard['dataPath']!r} is not a file name of this folder")
        if not path.is_file():
            raise MlcBuildError(f"{path}: missing; the folder's index names this shard, so copy or download it again")
        if path.stat().st_size != shard["nbytes"]:
            raise MlcBuildError(
                f"{path}: {path.stat().st_size} bytes, but the index says {shard['nbytes']}; copy or download it again"
            )
