"""The C kernels as shared libraries of their own, called through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild import zig
from mlcbuild.compiler import targets
from mlcbuild.compiler.cpu.build import link_target
from mlcbuild.compiler.cpu.experts import plan_size
from mlcbuild.compiler.cpu.formats import Format, sources
from mlcbuild.compiler.cpu.linear import PACK_TOKENS, TASK_ROWS
from mlcbuild.compiler.link import linkers
from tests.support.llama import CPU

Array = npt.NDArray[Any]
FOLDER = Path(targets.__file__).parent / "cpu" / "kernels"
# And those of the formats; choice.c has attention.c in it.
FILES = ("choice", "delta", "experts", "mlstm", "recurrent", "rows", "state_space")
LEVELS = {
    "native": targets.zig_cpu(targets.resolve(CPU)),
    "x86-64-v4": "x86_64_v4",
    "x86-64-v3": "x86_64_v3",
}
# Of those that mean the same processor here, one.
LEVELS_HERE = tuple(level for level, cpu in LEVELS.items() if level == "native" or cpu != LEVELS["native"])


class Kernels:
    """Those of one model dtype: `kernels("mlcbuild_rms_norm", x, w, y, 0, 5, 1e-5)`.

    Arrays are passed as pointers, ints as i64, floats as f32.
    """

    def __init__(
        self, cpu: str, folder: Path, dtype: str, formats: Sequence[Format] = (), activation_bits: int | None = None
    ) -> None:
        level = "x86-64-v4"
        if cpu == LEVELS[level] and targets.cpu_level(targets.cpu_flags()) != level:
            pytest.skip(f"needs a processor of {level}")
        folder.mkdir(parents=True, exist_ok=True)
        objects = []
        for source in sources(formats, dtype, FILES, activation_bits):
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

    def product_of_experts(self, form: Format, x: Array, chosen: Array, parts: Sequence[Array], rows: int) -> Array:
        """x [n, K] or [n * count, K] times the weights [experts, rows, K] that chosen says: [n * count, rows]."""
        pairs, columns, experts = chosen.size, x.shape[1], len(parts[0])
        stride = -(-columns // form.padded_to) * form.padded_to
        plan = np.full(plan_size(pairs, experts), -1, np.int32)
        self("mlcbuild_plan_experts", chosen, plan, pairs, experts, pairs // len(x))
        packed = np.full((pairs, stride), np.nan, np.float32)
        for task in range(int(plan[1])):
            sizes = (pairs, experts, columns, stride, task)
            self(f"mlcbuild_{form.name}_pack_experts", x, np.int32(1), plan, packed, *sizes)
        y = np.full((pairs, rows), 7, np.float32)
        missing = 5 - len(parts)
        given = [*parts, *[None] * missing, *[part[0].nbytes for part in parts], *[0] * missing]
        for task in range(int(plan[0]) * -(-rows // TASK_ROWS)):
            shape = (pairs, experts, rows, columns, stride, task)
            self(f"mlcbuild_{form.name}_multiply_experts", packed, plan, *given, y, *shape)
        return y


def rounds_many_rows(form: Format, dtype: str, activation_bits: int | None, cpu: str, folder: Path) -> bool:
    """Whether products of many rows round activations on this processor: the kernels' headers say so."""
    (source,) = sources([form], dtype, (), activation_bits)
    macros, triple = folder / "macros.h", link_target(CPU.linker, targets.resolve(CPU))
    defines = [f"-D{name}={value}" for name, value in source.defines]
    command = ["cc", "-target", triple, f"-mcpu={cpu}", *defines, "-E", "-dM", str(FOLDER / source.file)]
    zig.run_zig([*command, "-o", str(macros)], folder / "zig")
    return "#define HAS_DIGIT_PANELS" in macros.read_text()


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
