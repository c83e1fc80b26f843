"""What this machine can build, and why not the rest: `mlcbuild doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.compiler import targets, tools
from mlcbuild.compiler.codegen import cuda
from mlcbuild.compiler.web import emscripten
from mlcbuild.errors import Unavailable
from mlcbuild.recipes.types import Target

_DISTRIBUTIONS = ("apache-tvm", "apache-tvm-ffi", "ziglang")


@dataclass(frozen=True)
class Diagnosis:
    """`machine`: facts by name. `targets`: what each target lacks, in one sentence; None: it can be built."""

    machine: Mapping[str, str]
    targets: Mapping[str, str | None]

    @property
    def ok(self) -> bool:
        return not any(self.targets.values())

    def to_json(self) -> dict[str, Any]:
        return {"machine": dict(self.machine), "targets": {n: {"missing": m} for n, m in self.targets.items()}}


def diagnose(known: Iterable[Target], cache: Path) -> Diagnosis:
    """The same checks that a build makes while it plans, for every target; nothing is downloaded or written."""
    return Diagnosis(_machine(cache), {target.name: _missing(target) for target in known})


def render(diagnosis: Diagnosis) -> str:
    width = max(map(len, [*diagnosis.machine, *diagnosis.targets]))
    lines = [f"{name:{width}}  {value}" for name, value in diagnosis.machine.items()]
    lines += ["", *(f"{name:{width}}  {missing or 'ok'}" for name, missing in diagnosis.targets.items())]
    return "\n".join(lines) + "\n"


def _missing(target: Target) -> str | None:
    try:
        targets.resolve(target)
    except Unavailable as error:
        return str(error).removeprefix(f"target {target.name}: ")
    return tools.wrong(target) or tools.missing(target)


def _machine(cache: Path) -> dict[str, str]:
    folder = next(place for place in (cache, *cache.parents) if place.exists())
    nvcc, emcc, ptxas = cuda.find_nvcc(), emscripten.find_emcc(), shutil.which("ptxas")
    beside = nvcc.parent / "ptxas" if nvcc else None
    return {
        **{name: _version(name) for name in _DISTRIBUTIONS},
        "nvcc": str(nvcc or "none"),
        "ptxas": ptxas or (str(beside) if beside and beside.is_file() else "none"),
        "emcc": f"{emcc}, {emscripten.version()}" if emcc else "none",
        "GPU": _gpu(),
        "free disk": f"{shutil.disk_usage(folder).free / 1e9:.0f} GB in {folder}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB",
        "hub token": "present" if _has_token() else "none",
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none: `pip install mlcbuild` brings it"


def _gpu() -> str:
    """What NVIDIA's driver says is there. No target needs it: libraries are built without a device."""
    if shutil.which("nvidia-smi") is None:
        return "none found (none is needed)"
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return "; ".join(line.split(" (")[0] for line in done.stdout.splitlines()) or "none found (none is needed)"


def _has_token() -> bool:
    """Whether the hub would be asked with a token. It is never shown."""
    from huggingface_hub import get_token

    return get_token() is not None
