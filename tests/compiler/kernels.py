"""The C kernels as shared libraries of their own, called through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild import zig
from mlcbuild.compiler import linkers, targets
from mlcbuild.compiler.cpu.formats import Format, sources
from mlcbuild.compiler.cpu.linear import PACK_TOKENS, TASK_ROWS
from tests.support.llama import CPU

Array = npt.NDArray[Any]
FOLDER = Path(linkers.__file__).parent / "cpu" / "kernels"
LEVELS = {
    "native": targets.zig_cpu(targets.resolve(CPU)),
    "x86-64-v4": "x86_64_v4",
    "x86-64-v3": "x86_64_v3",
}


class Kernels:
    """Those of one model dtype: `kernels("mlcbuild_rms_norm", x, w, y, 0, 5, 1e-5)`.

    Arrays are passed as pointers, ints as i64, floats as f32.
    """

    def __init__(self, cpu: str, folder: Path, dtype: str, formats: Sequence[Format] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        objects = []
        for source in sources(formats, dtype):
            objects.append(folder / f"{source.name}.o")
            defines = [*source.defines, ("EXPORT", "")]
            triple = "x86_64-linux-gnu.2.28"
            linkers.zig_compile(FOLDER / source.file, objects[-1], triple, cpu, folder / "zig", defines)
        output = folder / "kernels.so"
        flags = ["-target", "x86_64-linux-gnu.2.28", "-shared", "-nostdlib", "-Wl,-z,undefs"]
        zig.run_zig(["cc", *flags, "-o", str(output), *map(str, objects)], folder / "zig")
        ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(output))

    def __call__(self, name: str, *arguments: Any) -> None:
        getattr(self._library, name)(*map(_argument, arguments))

    def product(self, form: Format, x: Array, parts: Sequence[Array], rows: int, out_dtype: str = "float32") -> Array:
        """x [n, K] times the weights [rows, K] that `parts` are, task by task."""
        tokens, columns = x.shape
        stride = -(-columns // form.padded_to) * form.padded_to
        packed = np.full((tokens, stride), np.nan, np.float32)
        for task in range(-(-tokens // PACK_TOKENS)):
            self(f"mlcbuild_{form.name}_pack", x, _wide(x.dtype), packed, tokens, columns, stride, task)
        y = np.full((tokens, rows), 7, out_dtype)
        given = [*parts, *[None] * (5 - len(parts))]
        for task in range(-(-rows // TASK_ROWS)):
            sizes = (tokens, rows, columns, stride, task)
            self(f"mlcbuild_{form.name}_multiply", packed, *given, y, _wide(y.dtype), *sizes)
        return y


def _wide(dtype: Any) -> np.int32:
    return np.int32(dtype == np.float32)


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, np.int32):
        return ctypes.c_int32(int(value))
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)
