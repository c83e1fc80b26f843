"""Modules for the emulated device: kernels' source compiled for this CPU by zig."""

from __future__ import annotations

import platform
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlcbuild.emulation.source import translated
from mlcbuild.errors import MlcBuildError, Unavailable
from mlcbuild.zig import run_zig

DEVICE = Path(__file__).parent / "device"
_HEADER = b"mlcbuild kernels"  # device/device.cpp
_TRIPLE, _CPU = "x86_64-linux-gnu.2.28", "x86_64_v3"
_KERNEL_FLAGS = (  # numbers that nobody set are not zero on a device; float16 is rounded after each operation
    "-O1",
    "-ftrivial-auto-var-init=pattern",
    *("-Xclang", "-ffloat16-excess-precision=none"),
    "-w",
)


def compile_source(code: str, language: str, scratch: Path) -> bytes:
    """The image of a module for the emulated device: source as TVM writes it, compiled for this CPU.

    `language` is one of source.LANGUAGES. Raises MlcBuildError with the compiler's message.
    """
    source, image = scratch / f"{language}_kernels.cpp", scratch / f"{language}_kernels.so"
    source.write_text(translated(code, language))
    with ThreadPoolExecutor() as pool:
        threads = pool.submit(compile_file, DEVICE / "threads.cpp", scratch, "-O2")
        kernels = compile_file(source, scratch, *_KERNEL_FLAGS)
    link([kernels, threads.result()], image, scratch)
    content = image.read_bytes()
    return _HEADER + struct.pack("<Q", len(content)) + content


def check_machine() -> None:
    """Raises Unavailable on another machine than x86-64."""
    if platform.machine() != "x86_64":
        raise Unavailable(f"the emulated device runs on x86-64, not on {platform.machine()}")


def compile_file(source: Path, scratch: Path, *flags: str) -> Path:
    """An object file in `scratch`. Raises MlcBuildError with the compiler's message."""
    output = scratch / f"{source.stem}.o"
    common = ["-c", "-g0", "-target", _TRIPLE, f"-mcpu={_CPU}", "-std=c++20", "-fPIC", "-fvisibility=hidden"]
    run_zig(["c++", *common, f"-I{DEVICE}", *flags, "-o", str(output), str(source)], scratch / "zig")
    return output


def link(objects: list[Path], output: Path, scratch: Path, *flags: str) -> None:
    """Without any library: what is missing is in the process that loads it."""
    command = ["cc", "-shared", "-s", "-nostdlib", "-target", _TRIPLE, *flags]
    run_zig([*command, "-o", str(output), *map(str, objects)], scratch / "zig")
    if not output.is_file():
        raise MlcBuildError(f"zig did not write {output}")
