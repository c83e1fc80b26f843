"""CUDA source compiled and read back as machine code: what a kernel executes, and what it has on its way."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlcbuild.compiler.gpu import cuda
from mlcbuild.errors import Unavailable

_KERNEL = re.compile(r"^\s*\.section\s+\.text\.(\w+)", re.MULTILINE)
_LINE = re.compile(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_USED = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """`instructions` from the first to the last EXIT; `loop` is the part of them that a backward branch repeats.

    Of several, the one with the most matrix instructions; of such, the longest.
    """

    instructions: tuple[str, ...]
    loop: tuple[int, int]
    registers: int
    spilled: int  # bytes

    def counted(self) -> Counter[str]:
        return Counter(name.split(".")[0] for name in self.instructions)

    def executed(self, times: float) -> float:
        """Instructions of a warp that goes through the loop so often."""
        begin, end = self.loop
        return len(self.instructions) + (times - 1) * (end - begin)

    def before(self, first: str, wanted: str) -> int:
        """How many `wanted` come before the first instruction of a class."""
        place = next(i for i, name in enumerate(self.instructions) if name.startswith(first))
        return sum(name.startswith(wanted) for name in self.instructions[:place])


def kernels(source: str, architecture: str, folder: Path) -> dict[str, Kernel]:
    """Each kernel of a CUDA source. Skips where nvcc or nvdisasm is missing."""
    try:
        tools = cuda.toolkit()
    except Unavailable as error:
        pytest.skip(str(error))
    (folder / "kernels.cu").write_text(source)
    flags = ["-cubin", f"-arch={architecture}", "-O3", "--use_fast_math", "-std=c++17", "-Xptxas", "-v"]
    command = [str(tools.nvcc), *flags, "-o", "kernels.cubin", "kernels.cu"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:1000]
    used = {name: (int(stored) + int(loaded), int(count)) for name, stored, loaded, count in _USED.findall(done.stderr)}
    command = [_disassembler(tools.nvcc), "-c", "kernels.cubin"]
    text = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    pieces = _KERNEL.split(text)[1:]
    return {name: _kernel(code, *used[name]) for name, code in zip(pieces[::2], pieces[1::2], strict=True)}


@functools.cache
def _disassembler(nvcc: Path) -> str:
    folders = (nvcc.parent, *(folder / "bin" for folder in cuda.packages()))
    found = next((str(at / "nvdisasm") for at in folders if (at / "nvdisasm").is_file()), shutil.which("nvdisasm"))
    if found is None:
        pytest.skip("no nvdisasm here: pip install nvidia-cuda-nvdisasm")
    return found


def _kernel(code: str, spilled: int, registers: int) -> Kernel:
    names: list[str] = []
    labels: dict[str, int] = {}
    loop, end = (0, 0), 0
    for label, name, rest in _LINE.findall(code):
        if label:
            labels[label] = len(names)
            continue
        names.append(name)
        target = re.search(r"\.L_x_\d+", rest)
        # The branch to itself at the end only fills up.
        if name.startswith("BRA") and target and labels.get(target.group(), len(names)) < len(names) - 1:
            begin = labels[target.group()]
            loop = max(loop, (begin, len(names)), key=lambda span: (_products(names[slice(*span)]), span[1] - span[0]))
        if name.startswith("EXIT"):
            end = len(names)
    return Kernel(tuple(names[:end]), loop, registers, spilled)


def _products(names: list[str]) -> int:
    return sum(name.startswith("HMMA") for name in names)
