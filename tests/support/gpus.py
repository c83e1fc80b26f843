"""What kernels for GPUs run on here: one list of devices for all tests of kernels.

`cuda`, `metal` and `opencl` are emulated: every kernel runs in three orders of its threads, between closed pages.
`wgsl` and `spirv` are one software Vulkan device. Libraries for `mali` and `android` hold the very kernels of `opencl`.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from mlcbuild.emulation.kernels import Kernel as EmulatedKernel
from mlcbuild.emulation.kernels import Machine
from mlcbuild.recipes.load import load
from tests.support import device_code, spirv, wgsl

Array = npt.NDArray[Any]
_ROOT = Path(__file__).parents[2]


class Kernel(Protocol):
    def run(self, grid: Sequence[int], arrays: Mapping[str, Array], scalars: Mapping[str, Any]) -> dict[str, Array]:
        """What the kernel makes of `arrays`, by their names in the script; `grid` is its blocks along x, y, z."""


@dataclass(frozen=True, eq=False)
class Gpu:
    """`compiled`: the kernels of one scheduled TIR function, in the order in which they stand in it.

    vocabulary: one that a kernel goes through in a second or two.
    """

    name: str
    TARGET: Mapping[str, Any]
    compiled: Callable[[Any], Sequence[Kernel]]
    vocabulary: int = 128_256

    @property
    def kind(self) -> str:
        return str(self.TARGET["kind"])

    def scheduled(self, function: Any) -> Any:
        """`function` as the compiler schedules it for this device."""
        import tvm
        from tvm import target

        from mlcbuild.compiler.gpu.device import device_of
        from mlcbuild.compiler.gpu.schedules import schedule
        from mlcbuild.compiler.script import quick

        with quick(), target.Target(dict(self.TARGET)):
            return schedule(tvm.IRModule({"main": function}), device_of(self.TARGET))["main"]

    def kernels(self, function: Any) -> Sequence[Kernel]:
        return _kernels(self, function)

    def launch(
        self, function: Any, which: int, arrays: Mapping[str, Array], scalars: Mapping[str, Any]
    ) -> dict[str, Array]:
        """Run one kernel of a scheduled function."""
        return self.kernels(function)[which].run(device_code.grids(function, scalars)[which], arrays, scalars)


@dataclass(frozen=True)
class _Emulated:
    kernel: EmulatedKernel
    block: device_code.Block

    def run(self, grid: Sequence[int], arrays: Mapping[str, Array], scalars: Mapping[str, Any]) -> dict[str, Array]:
        return self.kernel.run(grid, self.block.threads, arrays, scalars, self.block.shared_bytes)


def _emulated(name: str) -> Gpu:
    target = load(_ROOT).targets[name].device

    def compiled(function: Any) -> list[Kernel]:
        code, blocks = device_code.source(function, target)
        found = machine().load(code, str(target["kind"]))
        return [_Emulated(found[each], block) for each, block in blocks.items()]

    return Gpu(name, target, compiled, vocabulary=20_003)


@functools.cache
def machine() -> Machine:
    return Machine(Path(tempfile.mkdtemp(prefix="emulated-")))


@functools.lru_cache(maxsize=32)
def _kernels(gpu: Gpu, function: Any) -> Sequence[Kernel]:
    return gpu.compiled(function)


DEVICES = (
    *map(_emulated, ("cuda", "metal", "opencl")),
    Gpu("wgsl", wgsl.TARGET, wgsl.kernels),
    Gpu("spirv", spirv.TARGET, spirv.kernels),
)
