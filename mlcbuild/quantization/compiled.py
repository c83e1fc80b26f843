"""The packing kernel of `group.py` in C, compiled here for this machine when there is enough to pack: the same bytes,
three to four times as fast.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlcbuild.errors import MlcBuildError
from mlcbuild.quantization import floats, group
from mlcbuild.quantization.floats import Array
from mlcbuild.quantization.packing import Packed, empty
from mlcbuild.quantization.schemes import STORAGE_BITS
from mlcbuild.recipes.types import Weights
from mlcbuild.zig import run_zig

_SOURCE = Path(__file__).parent / "kernels" / "group.c"
# Without a C library, which zig would build first, and without anything that lets a compiler change a rounding.
_FLAGS = ("-shared", "-nostdlib", "-fPIC", "-O3", "-mcpu=native", "-ffp-contract=off", "-fno-math-errno")
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


class Compiled:
    """Kernels by format, compiled in `folder` when they are first called. May be used by several threads.

    Where the compiler fails, `note` is told and NumPy does the work.
    """

    def __init__(self, folder: Path, note: Callable[[str], None] = lambda text: None) -> None:
        self._folder = folder
        self._note = note
        self._lock = threading.Lock()
        self._functions: dict[tuple[str, Weights, str], Any] = {}

    def encode(self, rows: Array, source: str, weights: Weights, model_dtype: str) -> Packed:
        """`group.encode`."""
        function = self._function(source, weights, model_dtype)
        if function is None:
            return group.encode(rows, source, weights, model_dtype)
        if not rows.flags.c_contiguous or rows.ctypes.data % rows.itemsize:
            rows = np.array(rows, order="C")
        packed = empty(rows, weights, floats.STORAGE[model_dtype])
        if not function(rows.ctypes.data, *rows.shape, packed.words.ctypes.data, packed.scales.ctypes.data):
            floats.check(rows, source, model_dtype)
            raise AssertionError("the kernel found a bad value where there is none")
        return packed

    def _function(self, source: str, weights: Weights, model_dtype: str) -> Any:
        """None where there is none."""
        key = (source, weights, model_dtype)
        with self._lock:
            if key not in self._functions:
                try:
                    self._functions[key] = self._compile(len(self._functions), *key)
                except (MlcBuildError, OSError) as error:
                    self._functions[key] = None
                    self._note(f"weights are packed more slowly: the kernel could not be compiled: {error}")
            return self._functions[key]

    def _compile(self, number: int, source: str, weights: Weights, model_dtype: str) -> Any:
        library = self._folder / f"group{number}.so"
        defines = {
            "SOURCE": _DTYPES[source],
            "MODEL": _DTYPES[model_dtype],
            "BITS": weights.bits,
            "GROUP": weights.group_size,
            "WORD_BITS": STORAGE_BITS[weights.storage_dtype],
            "FLOOR": float(weights.scale_floor),
        }
        arguments = [f"-D{name}={value}" for name, value in defines.items()]
        run_zig(["cc", *_FLAGS, *arguments, str(_SOURCE), "-o", str(library)], self._folder / "zig")
        function = ctypes.CDLL(str(library)).mlcbuild_group_encode
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
        function.restype = ctypes.c_int
        return function
