"""A library of a stock CUDA target whose kernels are compiled for the emulated device."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from mlcbuild.compiler import assemble
from mlcbuild.compiler.gpu.build import build
from mlcbuild.compiler.gpu.lower import lower
from mlcbuild.emulation import cuda
from mlcbuild.models.structure import Structure
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import Quantization

ROOT = Path(__file__).parents[2]


def build_library(structure: Structure, quantization: Quantization, folder: Path, name: str = "cuda") -> Path:
    """Lower, generate code and link, in this process, for the target `name`; the library's file."""
    target = load(ROOT).targets[name]
    folder.mkdir(parents=True, exist_ok=True)
    lowered = lower(replace(structure, vocab_size=1), quantization, quantization.name, target.device)
    assemble.save(lowered, folder / "module.json")
    build(
        folder / "module.json",
        target.device,
        {**target.host, "opt-level": 0},  # calls of kernels, and sizes
        target.linker,
        folder / "model.so",
        folder,
        compile_cuda=functools.partial(cuda.compile_source, scratch=folder),
    )
    return folder / "model.so"
