"""Targets made concrete: what `mcpu: native` means on this machine, and whether this machine can run a library.

Nothing here imports TVM: a plan needs these answers, and a plan is made in milliseconds. Names of levels and features
are LLVM's; the levels are those of the x86-64 psABI.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlcbuild import host
from mlcbuild.errors import Unavailable
from mlcbuild.recipes.types import Target

# What a level adds to the one before it, as /proc/cpuinfo spells it.
_LEVELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("x86-64", frozenset()),
    ("x86-64-v2", frozenset({"cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"})),
    ("x86-64-v3", frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})),
    ("x86-64-v4", frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})),
)

# Beyond the levels: /proc/cpuinfo's name -> LLVM's.
_FEATURES = {
    "avx_vnni": "avxvnni",
    "avx512_vnni": "avx512vnni",
    "avx512vbmi": "avx512vbmi",
    "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16",
    "asimdhp": "fullfp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
}


def resolve(target: Target) -> dict[str, Any]:
    """The TVM target of `target`'s device, `mcpu: native` replaced by a CPU level and features.

    The answer goes into keys, so it must be the same on machines that can run each other's libraries. Raises
    Unavailable when this machine's processor is of a kind that `native` does not know.
    """
    device = dict(target.device)
    device.update({f"supports_{feature}": True for feature in device.pop("supports", ())})
    if device.get("mcpu") != "native":
        return device
    machine, system = platform.machine(), platform.system()
    if system != "Linux":
        raise Unavailable(
            f"target {target.name}: `mcpu: native` builds for Linux, this machine runs {system}: build on Linux, where "
            "what is built for other systems is verified, too"
        )
    flags = cpu_flags()
    features = sorted(llvm for name, llvm in _FEATURES.items() if name in flags)
    if machine == "x86_64":
        level = cpu_level(flags)
        if level not in ("x86-64-v3", "x86-64-v4"):
            raise Unavailable(
                f"target {target.name}: this machine's processor is an {level}; CPU libraries need x86-64-v3 "
                "(AVX2, FMA, F16C): build for another target"
            )
        # The level's own tuning halves the vectors, for the processors of 2017.
        features += ["-prefer-256-bit"] if level == "x86-64-v4" else []
        device.update(mtriple="x86_64-linux-gnu", mcpu=level)
    elif machine in ("aarch64", "arm64"):
        device.update(mtriple="aarch64-linux-gnu", mcpu="generic")
        features = ["neon", *features]
    else:
        raise Unavailable(f"target {target.name}: `mcpu: native` knows x86_64 and aarch64, this machine is {machine}")
    if features:
        device["mattr"] = [f if f[0] == "-" else f"+{f}" for f in features]
    return device


def is_gpu(target: Target) -> bool:
    return str(target.device["kind"]) != "llvm"


def runs_here(target: Target) -> bool:
    """Whether this machine can execute a library of `target`."""
    if target.executes == "native" or real_device(target) is not None:
        return True
    if target.executes == "aarch64":
        return platform.machine() in ("aarch64", "arm64") and platform.system() == "Linux"
    levels = [name for name, _ in _LEVELS]
    if target.executes not in levels or platform.machine() != "x86_64":
        return False
    return levels.index(target.executes) <= levels.index(cpu_level(cpu_flags()))


def real_device(target: Target) -> str | None:
    """The name of the GPU of this machine that libraries of `target` run on; None where there is none."""
    if target.device["kind"] != "cuda" or not Path("/dev/nvidiactl").exists():
        return None
    if not str(target.host.get("mtriple", "")).startswith(f"{platform.machine()}-linux"):
        return None  # a library is code of its host, too
    found = sorted((host.PROC / "driver/nvidia/gpus").glob("*/information"))
    names = [line.partition(":")[2].strip() for line in found[0].read_text().splitlines()] if found else []
    return names[0] if names else None


def not_executed(target: Target) -> str | None:
    """Why the kernels of a GPU's library are not run before it is shipped; None where they are."""
    kind = target.device["kind"]
    if not is_gpu(target):
        return "a CPU's library is verified whole, where this machine can run it"
    if kind != "cuda":
        return f"the emulated device runs whole libraries of kind cuda, and none of kind {kind}"
    if real_device(target) is not None or (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        return None
    return f"the emulated device runs on x86-64 Linux, not on {platform.machine()} {platform.system()}"


def zig_cpu(device: Mapping[str, Any]) -> str:
    """The same CPU in zig's spelling: `x86_64_v4+avx512vnni-prefer_256_bit`."""
    name = str(device.get("mcpu") or "baseline").replace("-", "_")
    return name + "".join(a[0] + a[1:].replace("-", "_") for a in device.get("mattr", ()))


def cpu_level(flags: frozenset[str]) -> str:
    """The highest x86-64 level of which all features are among `flags`."""
    best = _LEVELS[0][0]
    for name, needs in _LEVELS:
        if not needs <= flags:
            break
        best = name
    return best


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The features of this machine's first processor, as the kernel names them."""
    try:
        text = (host.PROC / "cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
