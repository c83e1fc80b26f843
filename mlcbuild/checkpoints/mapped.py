"""Tensor bytes of a checkpoint file, memory-mapped: read when used, given back to the system after use."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild import host
from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.errors import CheckpointError

# The float dtypes that a parameter may have: safetensors' name -> (ours, how NumPy holds it; it has no bfloat16).
FLOATS: dict[str, tuple[str, np.dtype[Any]]] = {
    "F16": ("float16", np.dtype("<f2")),
    "BF16": ("bfloat16", np.dtype("<u2")),
    "F32": ("float32", np.dtype("<f4")),
}
STORAGE = dict(FLOATS.values())


class MappedFile:
    """A whole file, mapped read-only. Views stay valid for as long as they are referenced."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size == 0:
                raise CheckpointError(f"{path}: the file is empty")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._path = path

    def view(self, offset: int, count: int, dtype: str) -> npt.NDArray[Any]:
        """`count` values of `dtype` (float16, bfloat16 as uint16, float32) at byte `offset`, read-only, not copied."""
        return self._array(STORAGE[dtype], count, offset)

    def bytes(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        return self._array(np.dtype(np.uint8), nbytes, offset)

    def _array(self, dtype: np.dtype[Any], count: int, offset: int) -> npt.NDArray[Any]:
        if offset + count * dtype.itemsize > len(self._map):
            raise CheckpointError(f"{self._path}: truncated: it is shorter now than when its tensors were indexed")
        return np.frombuffer(self._map, dtype, count, offset)

    def release(self, offset: int, nbytes: int) -> None:
        """Drop the pages that lie wholly inside the range from this process's memory; they can be read again."""
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            host.advise(self._map, "MADV_DONTNEED", start, end - start)


def read(ref: TensorRef) -> npt.NDArray[Any]:
    """The tensor as `view` gives it. Raises CheckpointError for a dtype that no parameter may have."""
    if ref.dtype not in FLOATS:
        raise CheckpointError(f"{ref.file}: tensor {ref.name}: dtype {ref.dtype}, expected {' '.join(FLOATS)}")
    return view(ref)


def view(ref: TensorRef) -> npt.NDArray[Any]:
    """The tensor as a mapped array of its shape, whatever its order; bfloat16 as uint16. Its dtype is of FLOATS."""
    dtype, storage = FLOATS[ref.dtype]
    if ref.strides is None or not ref.nbytes:
        return MappedFile(ref.path).view(ref.offset, ref.nbytes // storage.itemsize, dtype).reshape(ref.shape)
    last = sum((size - 1) * stride for size, stride in zip(ref.shape, ref.strides, strict=True))
    flat = MappedFile(ref.path).view(ref.offset, last + 1, dtype)
    strides = [stride * storage.itemsize for stride in ref.strides]
    return np.lib.stride_tricks.as_strided(flat, ref.shape, strides, writeable=False)


def same_bytes(one: TensorRef, other: TensorRef) -> bool:
    """Whether two tensors have the same bytes, compared a few megabytes at a time."""
    if one.strides != other.strides:
        return False
    if (one.blob and one.blob == other.blob and one.offset == other.offset and one.nbytes == other.nbytes) or (
        one.nbytes == other.nbytes == 0
    ):
        return True
    if one.nbytes != other.nbytes:
        return False
    left, right = MappedFile(one.path), MappedFile(other.path)
    step = 1 << 22
    for start in range(0, one.nbytes, step):
        count = min(step, one.nbytes - start)
        if not np.array_equal(left.bytes(one.offset + start, count), right.bytes(other.offset + start, count)):
            return False
        left.release(one.offset + start, count)
        right.release(other.offset + start, count)
    return True
