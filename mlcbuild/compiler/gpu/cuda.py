"""CUDA machine code by nvcc, on a machine that need not have a GPU or a driver.

TVM compiles CUDA source only where its CUDA runtime loads, which needs the driver's libcuda.so.1; without it, it puts
the *source* into the library, and says nothing. So where there is no driver, a stand-in of that name is loaded before
TVM is imported: its functions are never called, since nothing runs. And what comes out is checked.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlcbuild.compiler.gpu import device, sources
from mlcbuild.errors import MlcBuildError, Unavailable
from mlcbuild.zig import run_zig

_DRIVER = "libcuda.so.1"
_DRIVER_FUNCTIONS = (
    "cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString", "cuLaunchKernelEx",
    "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeTiled",
)  # fmt: skip
_BFLOAT16 = 80  # the first architecture whose tensor cores take it
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_RUNTIME = "libcudart.so.13"  # what this TVM was linked against
_FATBIN_MAGIC = b"\x50\xed\x55\xba"
ADVICE = "install CUDA 13, or `pip install 'mlcbuild[cuda]'`"


@dataclass(frozen=True)
class Toolkit:
    """nvcc, and CUDA's runtime library."""

    nvcc: Path
    runtime: Path


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of the search path, or from PyPI."""
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return Path(home) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    if found:
        return Path(found)
    return next((folder / "bin" / "nvcc" for folder in packages() if (folder / "bin" / "nvcc").is_file()), None)


def toolkit() -> Toolkit:
    """What compiles. Raises Unavailable, with what to install, where a part is missing."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise Unavailable(f"no nvcc here: {ADVICE}")
    for folder in (*_folders(nvcc), *packages()):
        for inner in ("lib64", "lib", "targets/x86_64-linux/lib"):
            if (folder / inner / _RUNTIME).is_file():
                return Toolkit(nvcc, folder / inner / _RUNTIME)
    raise Unavailable(f"no {_RUNTIME} beside {nvcc}: {ADVICE}")


def packages() -> Iterator[Path]:
    """Folders of CUDA 13 as PyPI packages install it."""
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(location).glob("cu13*"))


def _folders(nvcc: Path) -> Iterator[Path]:
    """The toolkit's folder, as nvcc itself says it: the nvcc of the search path may be a wrapper."""
    done = subprocess.run([str(nvcc), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    match = re.search(r"^#\$ TOP=(.*)$", done.stderr, re.MULTILINE)
    if match:
        yield Path(match.group(1).strip())
    yield nvcc.resolve().parent.parent


def load_runtime(tools: Toolkit, scratch: Path) -> None:
    """Load what TVM's CUDA runtime wants, before TVM is imported."""
    try:
        ctypes.CDLL(_DRIVER, ctypes.RTLD_GLOBAL)
    except OSError:
        source = scratch / "driver.c"
        source.write_text("".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}\n" for name in _DRIVER_FUNCTIONS))
        stand_in = scratch / _DRIVER
        flags = ["-shared", "-nostdlib", f"-Wl,-soname,{_DRIVER}", "-o", str(stand_in)]
        run_zig(["cc", *flags, str(source)], scratch / "zig")
        ctypes.CDLL(str(stand_in), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(tools.runtime), ctypes.RTLD_GLOBAL)


def compile_source(code: str, tools: Toolkit, architectures: Sequence[str], scratch: Path) -> bytes:
    """A fat binary of CUDA source with machine code for each of `architectures`.

    Raises MlcBuildError with nvcc's message, where what nvcc wrote is no fat binary, for bfloat16 on devices whose
    tensor cores have none, and for kernels that begin early on devices that cannot begin them so.
    """
    source, output = scratch / "kernels.cu", scratch / "kernels.fatbin"
    source.write_text(code)
    numbers = [name.removeprefix("sm_") for name in architectures]
    old = [f"sm_{n}" for n in numbers if int("".join(filter(str.isdigit, n))) < _BFLOAT16]
    if old and "nv_bfloat16" in code:
        raise MlcBuildError(
            f"architectures: {', '.join(old)} cannot multiply bfloat16, which came with sm_{_BFLOAT16}: "
            "take a float16 quantization, or leave them out of the target"
        )
    late = [f"sm_{n}" for n in numbers if int("".join(filter(str.isdigit, n))) < device.EARLIEST]
    if late and sources.EARLY in code:
        raise MlcBuildError(
            f"architectures: {', '.join(late)} cannot begin a kernel before the one before it has ended, as those of "
            f"device.arch sm_{device.EARLIEST} and later do: let device.arch be the oldest of the architectures"
        )
    flags = ["-fatbin", "-O3", "--use_fast_math", "--threads=0", "-std=c++17", "-diag-suppress=177,1046"]
    flags += [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    # The name of the file is in the binary: relative, so that it is the same everywhere.
    done = subprocess.run(
        [str(tools.nvcc), *flags, "-o", output.name, source.name],
        cwd=scratch,
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise MlcBuildError(f"nvcc failed ({done.returncode}):\n{(done.stderr or done.stdout).strip()[-4000:]}")
    binary = output.read_bytes()
    if not binary.startswith(_FATBIN_MAGIC):
        raise MlcBuildError(f"{tools.nvcc} wrote something that is no fat binary")
    return binary
