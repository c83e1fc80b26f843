"""The emulated CUDA device: its kernels compiled, its driver loaded, what it noted.

TVM's own CUDA runtime, unchanged, runs on stand-ins for `libcuda` and `libcudart` (device/driver.cpp). So a whole
library is run: the virtual machine, the paged KV cache, captured graphs, and every kernel thread by thread.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mlcbuild.compiler.gpu import cuda
from mlcbuild.emulation.source import translated
from mlcbuild.errors import MlcBuildError, Unavailable
from mlcbuild.runtime.device import Device
from mlcbuild.zig import run_zig

_DEVICE = Path(__file__).parent / "device"
_HEADER = b"mlcbuild kernels"  # device/driver.cpp
_RUNTIME, _DRIVER = "libcudart.so.13", "libcuda.so.1"  # what TVM's runtime is linked against
_TRIPLE, _CPU = "x86_64-linux-gnu.2.28", "x86_64_v3"
_KERNEL_FLAGS = ("-O1", "-ftrivial-auto-var-init=pattern", "-w")  # numbers that nobody set are not zero on a device


@dataclass(frozen=True)
class Report:
    """`notes`: what is wrong, by kernel. `launches`: how often each kernel ran."""

    notes: Mapping[str, tuple[str, ...]]
    launches: Mapping[str, int]


def compile_source(code: str, scratch: Path) -> bytes:
    """The image of a module for the emulated device: CUDA source as TVM writes it, compiled for this CPU.

    Raises MlcBuildError with the compiler's message.
    """
    source, image = scratch / "kernels.cpp", scratch / "kernels.so"
    source.write_text(translated(code))
    with ThreadPoolExecutor() as pool:
        threads = pool.submit(_compile, _DEVICE / "threads.cpp", scratch, "-O2")
        kernels = _compile(source, scratch, *_KERNEL_FLAGS)
    _link([kernels, threads.result()], image, scratch)
    content = image.read_bytes()
    return _HEADER + struct.pack("<Q", len(content)) + content


def load(scratch: Path) -> None:
    """Make this process's CUDA device an emulated one. To be called before TVM's CUDA runtime is loaded.

    Raises Unavailable where CUDA's headers are missing, and on another machine than x86-64.
    """
    _check_machine()
    headers = cuda.toolkit().runtime.parents[1] / "include"
    versions = scratch / "versions"
    versions.write_text(f"{_RUNTIME} {{ cuda*; }};\n")
    driver = _compile(_DEVICE / "driver.cpp", scratch, "-O2", "-isystem", str(headers))
    _link([driver], scratch / _RUNTIME, scratch, f"-Wl,-soname,{_RUNTIME}", f"-Wl,--version-script,{versions}")
    empty = scratch / "empty.cpp"
    empty.write_text("")
    _link([_compile(empty, scratch)], scratch / _DRIVER, scratch, f"-Wl,-soname,{_DRIVER}")
    for name in (_RUNTIME, _DRIVER):
        ctypes.CDLL(str(scratch / name), ctypes.RTLD_GLOBAL)
    _stand_in(str(scratch / _RUNTIME))
    Device("cuda").start()


def check(on: bool = True) -> None:
    """From now on, run every kernel in several orders of its threads and compare all of the device's memory."""
    _stand_in().emulation_check(int(on))


def forget() -> None:
    """Forget what was noted."""
    _stand_in().emulation_forget()


def report() -> Report:
    """What was noted so far, and which kernels ran."""
    ask = _stand_in().emulation_report
    ask.restype = ctypes.c_size_t
    buffer = ctypes.create_string_buffer(ask(None, ctypes.c_size_t(0)) + 1)
    ask(buffer, ctypes.c_size_t(len(buffer)))
    notes: dict[str, tuple[str, ...]] = {}
    launches: dict[str, int] = {}
    for line in buffer.value.decode().splitlines():
        what, kernel, text = line.split(" ", 2)
        if what == "note":
            notes[kernel] = (*notes.get(kernel, ()), text)
        else:
            launches[kernel] = launches.get(kernel, 0) + int(text)
    return Report(notes, launches)


@functools.cache
def _stand_in(path: str = _RUNTIME) -> ctypes.CDLL:
    return ctypes.CDLL(path)


def _check_machine() -> None:
    if platform.machine() != "x86_64":
        raise Unavailable(f"the emulated device runs on x86-64, not on {platform.machine()}")


def _compile(source: Path, scratch: Path, *flags: str) -> Path:
    output = scratch / f"{source.stem}.o"
    common = [
        "-c",
        "-g0",
        "-target",
        _TRIPLE,
        f"-mcpu={_CPU}",
        "-std=c++20",
        "-fPIC",
        "-fvisibility=hidden",
        f"-I{_DEVICE}",
    ]
    run_zig(["c++", *common, f"-I{_DEVICE}", *flags, "-o", str(output), str(source)], scratch / "zig")
    return output


def _link(objects: list[Path], output: Path, scratch: Path, *flags: str) -> None:
    """Without any library: what is missing is in the process that loads it."""
    command = ["cc", "-shared", "-s", "-nostdlib", "-target", _TRIPLE, *flags]
    run_zig([*command, "-o", str(output), *map(str, objects)], scratch / "zig")
    if not output.is_file():
        raise MlcBuildError(f"zig did not write {output}")
