"""Single kernels on the emulated device, whatever language they are in, over NumPy arrays.

Every kernel runs in several orders of its threads, with all of the device's memory compared.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.emulation import image
from mlcbuild.emulation.report import Report, read
from mlcbuild.emulation.source import Signature, signatures
from mlcbuild.errors import MlcBuildError

Array = npt.NDArray[Any]
_SLOT = 8  # bytes of a number among Metal's
_NUMBERS = {"int": np.int32, "uint": np.uint32, "long": np.int64, "int64_t": np.int64, "float": np.float32}


class Machine:
    """A device of this process. Raises Unavailable on another machine than x86-64."""

    def __init__(self, scratch: Path) -> None:
        image.check_machine()
        path = scratch / "device.so"
        image.link([image.compile_file(image.DEVICE / "device.cpp", scratch, "-O2")], path, scratch)
        self._library = ctypes.CDLL(str(path))
        for name in ("allocate", "load", "find", "problem"):
            getattr(self._library, f"emulation_{name}").restype = ctypes.c_void_p
        self._library.emulation_problem.restype = ctypes.c_char_p
        self._library.emulation_check(1)
        self._scratch = scratch

    def load(self, code: str, language: str) -> dict[str, Kernel]:
        """The kernels of a source as TVM writes it, by name. Raises MlcBuildError with the compiler's message."""
        compiled = image.compile_source(code, language, self._scratch)
        module = self._library.emulation_load(compiled)
        if not module:
            raise MlcBuildError(self._library.emulation_problem().decode())
        found = {}
        for name, signature in signatures(code, language).items():
            handle = self._library.emulation_find(ctypes.c_void_p(module), name.encode())
            found[name] = Kernel(self, handle, signature)
        return found

    def launch(self, handle: int, sizes: Sequence[int], arguments: Sequence[bytes]) -> None:
        """`sizes` are device/device.cpp's. Raises MlcBuildError where the kernel has a fault or a race."""
        given = [ctypes.create_string_buffer(each, len(each)) for each in arguments]
        places = (ctypes.c_void_p * len(given))(*map(ctypes.addressof, given))
        fine = self._library.emulation_launch(ctypes.c_void_p(handle), (ctypes.c_uint * 8)(*sizes), places)
        report = read(self._library)
        self._library.emulation_forget()
        if report.notes or not fine:
            raise MlcBuildError(_described(report) or self._library.emulation_problem().decode())

    @contextlib.contextmanager
    def memory(self, arrays: Sequence[Array]) -> Iterator[list[int]]:
        """Where on the device copies of the arrays are; these are in the arrays afterwards."""
        places = [self._library.emulation_allocate(ctypes.c_size_t(max(array.nbytes, 1))) for array in arrays]
        try:
            for place, array in zip(places, arrays, strict=True):
                ctypes.memmove(place, array.ctypes.data, array.nbytes)
            yield places
            for place, array in zip(places, arrays, strict=True):
                ctypes.memmove(array.ctypes.data, place, array.nbytes)
        finally:
            for place in places:
                self._library.emulation_release(ctypes.c_void_p(place))


@dataclass(frozen=True)
class Kernel:
    """A kernel of a module that the machine has loaded."""

    machine: Machine
    handle: int
    signature: Signature

    def run(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        arrays: Mapping[str, Array],
        numbers: Mapping[str, float],
        shared_bytes: int = 0,
        early: bool = False,
    ) -> dict[str, Array]:
        """What becomes of `arrays`, by their names in the script, with `grid` blocks of `block` threads (x, y, z).

        `shared_bytes`: the dynamic shared memory of a block, which CUDA has; `early`: the kernel may begin before the
        one before it has ended, for which its threads are to wait.

        Raises MlcBuildError, naming the kernel, where it has a race, touches what it may not, or its threads are stuck.
        """
        parameters = self.signature.parameters
        made = {name: np.array(arrays[name], order="C") for name, kind in parameters if kind is None}
        with self.machine.memory([*made.values()]) as places:
            pointers = [np.uint64(place).tobytes() for place in places]
            given = [np.array(numbers[name], _NUMBERS[kind]).tobytes() for name, kind in parameters if kind]
            if self.signature.packed:
                given = [b"".join(each.ljust(_SLOT, b"\0") for each in given)]
            self.machine.launch(self.handle, [*grid, *block, shared_bytes, early], self._in_order(pointers, given))
        return made

    def _in_order(self, pointers: Sequence[bytes], numbers: Sequence[bytes]) -> list[bytes]:
        """Arrays and numbers as the parameters are mixed; packed numbers are last."""
        if self.signature.packed:
            return [*pointers, *numbers]
        first, second = iter(pointers), iter(numbers)
        return [next(first if kind is None else second) for _, kind in self.signature.parameters]


def _described(report: Report) -> str:
    return "\n".join(f"{kernel}: {'; '.join(texts)}" for kernel, texts in report.notes.items())
