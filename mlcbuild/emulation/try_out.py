"""A lowered CUDA module tried on the emulated device, against the CPU's library: what the step `execute` does there."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlcbuild.compiler.gpu import build
from mlcbuild.emulation import cuda
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.types import Linker


def library(lowered: Path, device: Mapping[str, Any], host: Mapping[str, Any], linker: Linker, scratch: Path) -> Path:
    """The module's library for the emulated device, which from now on is this process's CUDA device.

    To be called before TVM is imported. Raises MlcBuildError with the compiler's message, Unavailable where CUDA's
    headers are missing.
    """
    cuda.load(scratch)
    output = scratch / "emulated.so"
    compile_cuda = functools.partial(cuda.compile_source, scratch=scratch)
    build.build(lowered, device, host, linker, output, scratch, compile_cuda=compile_cuda)
    return output


def check(orders: bool) -> None:
    """From now on, run each kernel once, or in several orders of its threads."""
    cuda.check(orders)


def found() -> dict[str, Any]:
    """What ran, and which of the library's kernels did not. Raises MlcBuildError, naming them, where kernels fail."""
    report = cuda.report()
    if report.notes:
        notes = [f"{kernel}: {'; '.join(texts)}" for kernel, texts in report.notes.items()]
        raise MlcBuildError("\n".join(["kernels fail on the emulated device:", *notes]))
    idle = sorted(kernel for kernel, count in report.launches.items() if not count)
    return {"device": "emulated by mlcbuild", "kernels": len(report.launches) - len(idle), "kernels_not_run": idle}
