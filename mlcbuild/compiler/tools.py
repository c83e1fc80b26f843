"""What a target needs besides the pip packages, and whether it is here. Answers in milliseconds: a plan asks."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from mlcbuild.compiler.codegen import cuda
from mlcbuild.compiler.web import emscripten
from mlcbuild.recipes.types import Target

_HOST_COMPILERS = ("g++", "c++", "clang++")  # nvcc asks for one by itself


def missing(target: Target) -> str | None:
    """What this machine lacks to build for `target`, and what to do about it, in one sentence; None: nothing."""
    kind = target.device["kind"]
    if kind == "cuda" and cuda.find_nvcc() is None:
        return f"no nvcc here: {cuda.ADVICE}"
    if kind == "cuda" and not any(map(shutil.which, _HOST_COMPILERS)):
        return "nvcc needs a C++ compiler beside it: install g++"
    if kind == "vulkan" and not _tvm_with("vulkan"):
        return (
            "the TVM that is installed was built without Vulkan: build one with USE_VULKAN=ON "
            "and let TVM_LIBRARY_PATH point at the folder of its libraries"
        )
    if target.linker.kind == "wasm" and emscripten.find_emcc() is None:
        return f"no emcc here: {emscripten.ADVICE}"
    return None


def _tvm_with(device: str) -> bool:
    """Whether TVM's libraries have a runtime for `device`, which comes with the code generator."""
    package = importlib.util.find_spec("tvm")
    folders = [Path(p) / "lib" for p in (package.submodule_search_locations or ())] if package else []
    folders += [Path(p) for p in os.environ.get("TVM_LIBRARY_PATH", "").split(os.pathsep) if p]
    return any(True for folder in folders for _ in folder.glob(f"*tvm_runtime_{device}*"))
