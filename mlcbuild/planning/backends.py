"""What the planner knows of kinds of steps and of devices, as tables: a new one is one line here."""

from __future__ import annotations

from dataclasses import dataclass

from mlcbuild.engine.graph import Cost
from mlcbuild.recipes.types import Target

# Streaming steps hold pieces of the largest tensor; measuring holds the model twice, once as float32. A download
# waits for the network, not for a core.
COSTS = {
    "download": Cost(base=0.2e9, takes=("network",)),
    "unpack": Cost(base=1.0e9),
    "convert": Cost(base=0.2e9, factor=1.0, most=3e9),
    "calibrate": Cost(threads=True, base=0.5e9, factor=0.5, most=8e9),
    "allocate": Cost(threads=True, base=0.7e9, factor=0.7, most=10e9),
    "round": Cost(threads=True, base=0.7e9, factor=0.7, most=10e9),
    "quantize": Cost(threads=True, base=0.3e9, factor=1.0, most=3e9),
    "lower": Cost(base=1.0e9),
    "runtime": Cost(base=1.0e9),
    "library": Cost(base=0.7e9),
    "execute": Cost(base=1.0e9, factor=0.3, most=4e9),
    "package": Cost(base=0.2e9),
    "measure": Cost(threads=True, base=0.5e9, factor=3.0, most=12e9),
    "verify": Cost(base=0.3e9),
}


@dataclass(frozen=True)
class Backend:
    """Functions (`module:function`) that the steps of a device call. Only their code is in the steps' keys.

    lower, build    structure to module, module to library: what steps/lower.py and steps/library.py say they call
    options         fields of the step `library` that only this `build` takes
    takes           what compiling takes of a machine that has few of it
    """

    lower: str
    build: str
    options: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


_CPU = Backend("mlcbuild.compiler.cpu.lower:lower", "mlcbuild.compiler.cpu.build:build")
_LOWER_GPU, _BUILD_GPU = "mlcbuild.compiler.gpu.lower:lower", "mlcbuild.compiler.gpu.build:build"
_GPU = Backend(_LOWER_GPU, _BUILD_GPU, ("architectures", "prefix"))
# By the kind of a target's device; another kind is built as any GPU is.
_BACKENDS = {
    "llvm": _CPU,
    "cuda": Backend(_LOWER_GPU, _BUILD_GPU, ("architectures", "prefix"), ("nvcc",)),
    "vulkan": Backend(_LOWER_GPU, "mlcbuild.compiler.vulkan.build:build"),
}
# What makes the page to try a package with, by the target's kind of linker.
PAGES = {"wasm": "mlcbuild.compiler.web.try_out.page:chat_page"}


def backend(target: Target) -> Backend:
    """Whose code makes the libraries of a target."""
    return _BACKENDS.get(str(target.device["kind"]), _GPU)
