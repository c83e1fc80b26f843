"""The C kernels as a shared library of their own, called through ctypes."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from mlcbuild.compiler import linkers, targets
from tests.support.llama import CPU

SOURCES = Path(linkers.__file__).parent / "cpu" / "kernels"
LEVELS = {
    "native": targets.zig_cpu(targets.resolve(CPU)),
    "x86-64-v3": "x86_64_v3",
}


class Kernels:
    """`kernels("mlcbuild_rms_norm_float32", x, w, y, 0, 5, 1e-5)`: arrays as pointers, ints as i64, floats as f32."""

    def __init__(self, cpu: str, folder: Path) -> None:
        output = folder / "kernels.so"
        sources = map(str, sorted(SOURCES.glob("*.c")))
        flags = ["-O2", "-fPIC", "-fno-math-errno", "-fno-sanitize=all", "-shared", "-nostdlib", "-Wl,-z,undefs"]
        target = ["-target", "x86_64-linux-gnu.2.28", f"-mcpu={cpu}"]
        linkers.run_zig(["cc", *target, *flags, "-DEXPORT=", "-o", str(output), *sources], folder / "zig")
        ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(output))

    def __call__(self, name: str, *arguments: Any) -> None:
        getattr(self._library, name)(*map(_argument, arguments))


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, np.int32):
        return ctypes.c_int32(int(value))
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)
