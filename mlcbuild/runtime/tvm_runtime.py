"""TVM's runtime library, without TVM: no compiler, no `import tvm`.

A compiled model needs `libtvm_runtime` (3.4 MB) and `libtvm_ffi` (2.6 MB). `tvm_ffi` brings the second with its Python
binding; the first is opened from the installed package's folder. Where a program has imported tvm already, the same
library is opened a second time, which gives the same handle.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import Unavailable

if TYPE_CHECKING:
    import tvm_ffi

ALIGNMENT = 64  # bytes; compiled kernels assume it of every tensor


@functools.cache
def start() -> None:
    """Load the runtime, which registers its functions. Raises Unavailable where apache-tvm is not installed."""
    from tvm_ffi.libinfo import load_lib_ctypes

    package = importlib.util.find_spec("tvm")
    if package is None or not package.submodule_search_locations:
        raise Unavailable("apache-tvm is not installed: `pip install mlcbuild` brings the version that fits")
    folders = [Path(location) / "lib" for location in package.submodule_search_locations]
    load_lib_ctypes("apache-tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=folders)


@functools.cache
def function(name: str) -> Callable[..., Any]:
    """A function of the runtime, such as `vm.builtin.kv_state_add_sequence`."""
    import tvm_ffi

    start()
    found: Callable[..., Any] = tvm_ffi.get_global_func(name)
    return found


def tensor(array: npt.NDArray[Any]) -> tvm_ffi.Tensor:
    """`array` as a TVM tensor on the same memory; a copy where it is not contiguous or not aligned to 64 bytes."""
    import tvm_ffi

    if not array.flags.c_contiguous or array.ctypes.data % ALIGNMENT:
        array = aligned_copy(array)
    return tvm_ffi.from_dlpack(array, require_alignment=ALIGNMENT, require_contiguous=True)


def aligned_copy(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A contiguous copy at a 64-byte boundary."""
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def aligned_empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array at a 64-byte boundary, its content undefined."""
    nbytes = prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start_byte = -buffer.ctypes.data % ALIGNMENT
    return buffer[start_byte : start_byte + nbytes].view(dtype).reshape(shape)


def view(source: tvm_ffi.Tensor, shape: Sequence[int], dtype: str) -> tvm_ffi.Tensor:
    """The same memory under another shape and dtype of the same size."""
    return function("runtime.TVMTensorCreateView")(source, _shape(shape), dtype, 0)


def shape(*sizes: int) -> Any:
    """Integers as TVM takes them in sizes, sequence ids and lengths."""
    return _shape(sizes)


def _shape(sizes: Sequence[int]) -> Any:
    import tvm_ffi

    return tvm_ffi.Shape(sizes)


def array(source: tvm_ffi.Tensor, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A float32 copy of a tensor, reshaped: the library may reuse the tensor's memory in its next call."""
    if str(source.dtype) == "bfloat16":  # which NumPy does not know: float32 has the same 16 bits in front
        bits = np.array(np.from_dlpack(view(source, source.shape, "uint16")), np.uint32)
        return (bits << 16).view(np.float32).reshape(shape)
    return np.array(np.from_dlpack(source), np.float32).reshape(shape)
