"""The emulated CUDA device: its kernels compiled, its driver loaded, what it noted.

TVM's own CUDA runtime, unchanged, runs on stand-ins for `libcuda` and `libcudart` (device/driver.cpp). So a whole
library is run: the virtual machine, the paged KV cache, captured graphs, and every kernel thread by thread.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from mlcbuild.compiler.gpu import cuda
from mlcbuild.emulation import image
from mlcbuild.emulation.report import Report, read
from mlcbuild.runtime.device import Device

_RUNTIME, _DRIVER = "libcudart.so.13", "libcuda.so.1"  # what TVM's runtime is linked against


def compile_source(code: str, scratch: Path) -> bytes:
    """The image of a module for the emulated device: CUDA source as TVM writes it, compiled for this CPU.

    Raises MlcBuildError with the compiler's message.
    """
    return image.compile_source(code, "cuda", scratch)


def load(scratch: Path) -> None:
    """Make this process's CUDA device an emulated one. To be called before TVM's CUDA runtime is loaded.

    Raises Unavailable where CUDA's headers are missing, and on another machine than x86-64.
    """
    image.check_machine()
    headers = cuda.toolkit().runtime.parents[1] / "include"
    versions = scratch / "versions"
    versions.write_text(f"{_RUNTIME} {{ cuda*; }};\n")
    driver = image.compile_file(image.DEVICE / "driver.cpp", scratch, "-O2", "-isystem", str(headers))
    objects = [driver, image.compile_file(image.DEVICE / "device.cpp", scratch, "-O2")]
    image.link(objects, scratch / _RUNTIME, scratch, f"-Wl,-soname,{_RUNTIME}", f"-Wl,--version-script,{versions}")
    empty = scratch / "empty.cpp"
    empty.write_text("")
    image.link([image.compile_file(empty, scratch)], scratch / _DRIVER, scratch, f"-Wl,-soname,{_DRIVER}")
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
    return read(_stand_in())


@functools.cache
def _stand_in(path: str = _RUNTIME) -> ctypes.CDLL:
    return ctypes.CDLL(path)
