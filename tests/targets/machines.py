"""Other machines, emulated: TVM's runtime for them, a program that runs libraries there, and how it is started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlcbuild.recipes.types import Quantization
from tests.compiler.packing import pack_model
from tests.support import llama
from tests.support.llama import Array
from tests.support.tools import missing

RUNTIMES = "MLCBUILD_TEST_RUNTIMES"  # a folder of wheels of apache-tvm and apache-tvm-ffi for other machines
_DRIVER = Path(__file__).parent / "driver.c"
_CODES = {"i": 0, "u": 1, "f": 2, "b": 4}  # DLPack's, by a dtype's first letter


@dataclass(frozen=True)
class Machine:
    triple: str  # zig's
    wheel: str  # part of the wheels' names
    runtime: str
    library: str
    interpose: str  # what the driver is linked with
    emulators: tuple[str, ...]  # the first that is there
    environment: tuple[tuple[str, str], ...]


AARCH64 = Machine(
    "aarch64-linux-gnu.2.34",
    "aarch64",
    "libtvm_runtime.so",
    "model.so",
    "libtvm_ffi.so",
    ("qemu-aarch64", "qemu-aarch64-static"),
    (("QEMU_LD_PREFIX", "/usr/aarch64-linux-gnu"), ("QEMU_SET_ENV", "LD_LIBRARY_PATH={folder}")),
)
WINDOWS = Machine(
    "x86_64-windows-gnu",
    "win_amd64",
    "tvm_runtime.dll",
    "model.dll",
    "tvm_ffi.lib",
    ("/usr/lib/wine/wine64", "wine64", "wine"),
    (("WINEPREFIX", "{folder}/wine"), ("WINEDEBUG", "-all")),
)


def prepare(machine: Machine, folder: Path) -> list[str]:
    """The runtime and the driver in `folder`; the command to start the driver. Skips where something is not here."""
    emulator = next((found for name in machine.emulators if (found := shutil.which(name))), None)
    if emulator is None:
        missing(f"{machine.emulators[-1]}, to run code for {machine.triple}")
    wheels = sorted(Path(os.environ.get(RUNTIMES) or folder / "none").glob(f"apache_tvm*{machine.wheel}.whl"))
    if len(wheels) != 2:
        missing(f"wheels of apache-tvm and apache-tvm-ffi for {machine.wheel} in the folder {RUNTIMES}")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith((".so", ".dll", ".lib")) and ".cpython" not in name and "compiler" not in name:
                    (folder / Path(name).name).write_bytes(archive.read(name))
    include = Path(sysconfig.get_path("purelib")) / "tvm_ffi" / "include"
    driver = folder / "driver.exe"
    flags = ["-O1", "-fno-sanitize=all", f"-I{include}", "-o", str(driver)]
    command = [sys.executable, "-m", "ziglang", "cc", "-target", machine.triple, *flags]
    subprocess.run([*command, str(_DRIVER), str(folder / machine.interpose)], check=True)
    return [emulator, str(driver)]


def run(machine: Machine, command: list[str], library: Path, given: Any, ids: list[int], folder: Path) -> Array:
    """float32 [5, vocab_size]: the logits after `ids` but for the last four, and after each of those.

    `given` are the parameters in the library's order: an array and a dtype each.
    """
    home = Path(command[1]).parent
    lines, data = [], b""
    for array, dtype in given:
        bits = int("".join(c for c in dtype if c.isdigit()))
        lines.append(" ".join(map(str, ["parameters.bin", len(data), _CODES[dtype[0]], bits, *array.shape])))
        data += array.tobytes() + bytes(-array.nbytes % 64)
    (folder / "parameters.bin").write_bytes(data)
    (folder / "parameters.txt").write_text("\n".join(lines) + "\n")
    np.array(ids, np.int32).tofile(folder / "ids.bin")
    if library.name != machine.library:
        library = library.rename(library.with_name(machine.library))
    runtime = machine.runtime if machine is WINDOWS else str(home / machine.runtime)
    done = subprocess.run(
        [*command, f"./{library.relative_to(folder)}", runtime, "parameters.txt", "ids.bin", "logits.bin"],
        cwd=folder,
        env={**os.environ, **{key: value.format(folder=home) for key, value in machine.environment}},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return np.fromfile(folder / "logits.bin", np.float32).reshape(5, -1)


def packed(model: Any, quantization: Quantization) -> tuple[Any, Any]:
    """Parameters for the driver, and transformers' model with what they stand for."""
    given, meant = pack_model(llama.structure_of(model), quantization, llama.mlc_parameters(model))
    return given, llama.with_parameters(model, meant)
