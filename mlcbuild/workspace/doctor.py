"""What this machine can build, and why not the rest: `mlcbuild doctor`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.compiler import generators, targets, tools
from mlcbuild.compiler.generators import Generators
from mlcbuild.compiler.gpu import cuda
from mlcbuild.compiler.web import emscripten
from mlcbuild.errors import Unavailable
from mlcbuild.recipes.types import Target

_COMMANDS = re.compile(r"`(apt-get|pip) install ([^`]+)`")  # as the sentences about what is missing name them
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
    """The checks that a build makes while it plans and before it generates code, for every target.

    Nothing is downloaded or written. Asking TVM for its code generators takes a few seconds.
    """
    present = _generators()
    return Diagnosis(_machine(cache), {target.name: _missing(target, present) for target in known})


def render(diagnosis: Diagnosis) -> str:
    width = max(map(len, [*diagnosis.machine, *diagnosis.targets]))
    lines = [f"{name:{width}}  {value}" for name, value in diagnosis.machine.items()]
    lines += ["", *(f"{name:{width}}  {missing or 'ok'}" for name, missing in diagnosis.targets.items())]
    return "\n".join(lines) + "\n"


def remedy(diagnosis: Diagnosis) -> tuple[str | None, list[str]]:
    """One command that brings what the targets lack (None: nothing would), and the targets that it does not help."""
    wanted: dict[str, dict[str, None]] = {"apt-get": {}, "pip": {}}
    helpless = []
    for name, missing in diagnosis.targets.items():
        found = _COMMANDS.findall(missing or "")
        for program, words in found:
            wanted[program].update(dict.fromkeys(words.split()))
        if missing and not found:
            helpless.append(name)
    command = " && ".join(f"{program} install {' '.join(words)}" for program, words in wanted.items() if words)
    return command or None, helpless


def _missing(target: Target, present: Generators | str) -> str | None:
    try:
        device = targets.resolve(target)
    except Unavailable as error:
        return str(error).removeprefix(f"target {target.name}: ")
    if reason := tools.wrong(target):
        return reason
    lacking = present if isinstance(present, str) else generators.lacking(device, target.host or device, present)
    return "; ".join(filter(None, (tools.missing(target), lacking))) or None


def _generators() -> Generators | str:
    """What TVM was built with, asked in a process of its own, which a broken library may end; or why it did not say."""
    done = subprocess.run(
        [sys.executable, "-m", generators.__name__],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        return f"TVM does not load ({last}): `pip install --force-reinstall mlcbuild` brings one that does"
    found = json.loads(done.stdout.splitlines()[-1])
    return Generators(frozenset(found["devices"]), frozenset(found["processors"]))


def _machine(cache: Path) -> dict[str, str]:
    from huggingface_hub import get_token

    folder = next(place for place in (cache, *cache.parents) if place.exists())
    nvcc, emcc, ptxas = cuda.find_nvcc(), emscripten.find_emcc(), shutil.which("ptxas")
    beside = nvcc.parent / "ptxas" if nvcc else None
    return {
        **{name: _version(name) for name in _DISTRIBUTIONS},
        "nvcc": str(nvcc or "none"),
        "ptxas": ptxas or (str(beside) if beside and beside.is_file() else "none"),
        "emcc": f"{emcc}, {emscripten.version()}" if emcc else "none",
        "spirv-val": shutil.which("spirv-val") or "none (Vulkan libraries are built without being validated)",
        "GPU": _gpu(),
        "free disk": f"{shutil.disk_usage(folder).free / 1e9:.0f} GB in {folder}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB",
        "hub token": "none" if get_token() is None else "present",  # it is never shown
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
