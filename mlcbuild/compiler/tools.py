"""What a target needs besides the pip packages, and whether it is here. Answers in milliseconds: a plan asks."""

from __future__ import annotations

import shutil

from mlcbuild.compiler.gpu import cuda
from mlcbuild.compiler.web import emscripten
from mlcbuild.recipes.types import Target

_HOST_COMPILERS = ("g++", "c++", "clang++")  # nvcc asks for one by itself

# What cross-compiling to was tried, or is the same but for a name: the first and second parts of zig's triples.
_ZIG_MACHINES = ("x86_64", "aarch64")
_ZIG_SYSTEMS = ("linux", "macos", "windows", "ios")
# nvcc 13: `nvcc --list-gpu-code`.
_CUDA = ("75", "80", "86", "87", "88", "89", "90", "100", "103", "110", "120", "121")


def wrong(target: Target) -> str | None:
    """What no machine could build of `target`, as far as can be said without trying; None: nothing is known."""
    linker = target.linker
    if linker.kind == "zig" and linker.target != "native":
        machine, system = linker.target.split("-")[:2]
        for given, known in ((machine, _ZIG_MACHINES), (system.split(".")[0], _ZIG_SYSTEMS)):
            if given not in known:
                return f"linker target {linker.target}: `{given}` is none of {', '.join(known)}"
        triple = (target.host or target.device).get("mtriple", "").replace("arm64", "aarch64")
        if triple and triple.split("-")[0] != machine:
            return f"code is made for {triple}, but linked for {linker.target}"
    if target.device["kind"] == "vulkan" and linker.kind != "zig":
        return f"linker {linker.kind}: Vulkan libraries are linked by zig"
    if target.device["kind"] == "cuda":
        for each in target.architectures:
            if each.removeprefix("sm_").rstrip("af") not in _CUDA:
                return f"architecture {each}: nvcc of CUDA 13 knows {', '.join(f'sm_{n}' for n in _CUDA)}"
    return None


def missing(target: Target) -> str | None:
    """All that this machine lacks to build for `target`, and what to do about it, as one sentence; None: nothing."""
    kind, lacks = target.device["kind"], []
    if kind == "cuda" and cuda.find_nvcc() is None:
        lacks.append(f"no nvcc here: {cuda.ADVICE}")
    if kind == "cuda" and not any(map(shutil.which, _HOST_COMPILERS)):
        lacks.append("nvcc needs a C++ compiler beside it: install g++ (Debian: `apt-get install g++`)")
    if target.linker.kind == "wasm" and emscripten.find_emcc() is None:
        lacks.append(f"no emcc here: {emscripten.ADVICE}")
    return "; ".join(lacks) or None
