"""Where a library runs: the CPU, or a GPU whose runtime TVM's wheel has."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError, Unavailable
from mlcbuild.runtime import tvm_runtime

if TYPE_CHECKING:
    import tvm_ffi

_NUMBERS = {"cpu": 1, "cuda": 2}  # DLPack's, by TVM's name
GPUS = tuple(kind for kind in _NUMBERS if kind != "cpu")
_CUDA = "libcudart.so.13"  # what the wheel's CUDA runtime is linked against


@dataclass(frozen=True)
class Device:
    """The first device of a kind. Raises MlcBuildError for a kind that this runtime does not know."""

    kind: str = "cpu"

    def __post_init__(self) -> None:
        if self.kind not in _NUMBERS:
            raise MlcBuildError(f"device `{self.kind}`: this runtime runs libraries on {' and '.join(_NUMBERS)}")

    @property
    def number(self) -> int:
        """DLPack's number of the kind."""
        return _NUMBERS[self.kind]

    def start(self) -> None:
        """Load what the device needs. Raises Unavailable where this machine lacks it."""
        tvm_runtime.start()
        if self.kind == "cuda":
            _start_cuda()

    def place(self, tensor: tvm_ffi.Tensor) -> tvm_ffi.Tensor:
        """The tensor in the device's memory; on the CPU the tensor itself."""
        if self.kind == "cpu":
            return tensor
        import tvm_ffi

        where = tvm_ffi.device(self.kind, 0)
        allocate = tvm_runtime.function("runtime.TVMTensorAllocWithScope")
        placed = allocate(tvm_ffi.Shape(tensor.shape), tensor.dtype, where, None)
        nbytes = prod(tensor.shape) * tensor.dtype.itemsize
        tvm_runtime.function("runtime.TVMTensorCopyFromBytes")(placed, ctypes.c_void_p(tensor.data_ptr()), nbytes)
        return placed

    def tensor(self, array: npt.NDArray[Any]) -> tvm_ffi.Tensor:
        """The array as a tensor of the device."""
        return self.place(tvm_runtime.tensor(array))

    def array(self, tensor: tvm_ffi.Tensor, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """A float32 copy of a tensor, reshaped: the library may reuse the tensor's memory in its next call."""
        if self.kind == "cpu":
            return tvm_runtime.array(tensor, shape)
        wide = str(tensor.dtype) == "bfloat16"  # which NumPy does not know: float32 has the same 16 bits in front
        source = tvm_runtime.view(tensor, tensor.shape, "uint16") if wide else tensor
        copy = np.empty(tuple(source.shape), str(source.dtype))
        pointer = copy.ctypes.data_as(ctypes.c_void_p)
        tvm_runtime.function("runtime.TVMTensorCopyToBytes")(source, pointer, copy.nbytes)
        if wide:
            return (copy.astype(np.uint32) << 16).view(np.float32).reshape(shape)
        return copy.astype(np.float32).reshape(shape)


@functools.cache
def _start_cuda() -> None:
    for name in (_CUDA, *map(str, _packaged(_CUDA))):
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
            break
        except OSError:
            continue
    try:
        for library in _wheel("libtvm_runtime_cuda.so"):
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
            return
    except OSError as error:
        raise Unavailable(f"device cuda: it needs NVIDIA's driver and CUDA 13's runtime: {error}") from None
    raise Unavailable("device cuda: the installed apache-tvm has no CUDA runtime")


def _wheel(name: str) -> Iterator[Path]:
    """A library of apache-tvm's wheel."""
    spec = importlib.util.find_spec("tvm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / "lib" / name).is_file():
            yield Path(folder) / "lib" / name


def _packaged(name: str) -> Iterator[Path]:
    """A library of CUDA 13 as PyPI packages install it."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(folder).glob(f"cu13*/lib/{name}"))
