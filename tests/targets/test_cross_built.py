"""CPU libraries for other machines: what they are, the same bytes twice, and their logits where an emulator is here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from mlcbuild import zig
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes import convert
from mlcbuild.recipes.types import Target
from mlcbuild.runtime import library_file
from tests.support import llama
from tests.targets import machines
from tests.targets.machines import AARCH64, WINDOWS, Machine

_TARGETS = Path(__file__).parents[2] / "recipes" / "targets"
FORMATS = {
    "cpu-x86_64": "ELF x86-64",
    "cpu-x86_64-v4": "ELF x86-64",
    "cpu-aarch64": "ELF aarch64",
    "macos-arm64": "Mach-O arm64",
    "macos-x86_64": "Mach-O x86-64",
    "windows-x86_64": "PE x86-64",
}


def target(name: str) -> Target:
    return convert.target(name, yaml.safe_load((_TARGETS / f"{name}.yaml").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_two_fresh_folders_give_the_same_library(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build itself checks the processor, the entry and that no path of this machine is named."""
    structure = llama.structure_of(llama.transformers_llama())
    monkeypatch.delenv(zig.SHARED)  # each compiles everything itself
    one, other = (llama.build_library(structure, "q4f16_1", tmp_path / place, target(name)) for place in ("a", "b/c"))
    assert library_file.file_format(one.read_bytes()[:4096]) == FORMATS[name]
    assert one.read_bytes() == other.read_bytes()
    assert [path.name for path in one.parent.glob("model.*")] == [one.name]


def test_imports_are_for_processors_that_dlltool_knows(tmp_path: Path) -> None:
    wrong = replace(target("windows-x86_64"), linker=replace(target("windows-x86_64").linker, target="arm-windows-gnu"))
    with pytest.raises(
        MlcBuildError, match="linker target arm-windows-gnu: imports are known for x86_64, aarch64 only"
    ):
        from mlcbuild.compiler.link.linkers import zig_link

        zig_link([], tmp_path / "x.dll", wrong.linker.target, wrong.linker, tmp_path)


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return machines.prepare(AARCH64, tmp_path_factory.mktemp("aarch64"))


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return machines.prepare(WINDOWS, tmp_path_factory.mktemp("windows"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "features"),
    [
        *((q, []) for q in ("q0f32", "q0bf16", "q3f16_1", "q4f32_1")),
        *((q, ["+dotprod"]) for q in ("q4f16_1", "q8f16_1")),
    ],
)
def test_aarch64_computes_what_x86_64_computes(
    quantization: str, features: list[str], aarch64: list[str], tmp_path: Path
) -> None:
    """Every NEON kernel, on two threads, under qemu."""
    device = target("cpu-aarch64")
    device = replace(device, device={**device.device, "mattr": [*device.device["mattr"], *features]})
    compare(AARCH64, aarch64, device, quantization, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["q0f32", "q4f16_1"])
def test_windows_computes_what_linux_computes(quantization: str, windows: list[str], tmp_path: Path) -> None:
    """Under wine."""
    compare(WINDOWS, windows, target("windows-x86_64"), quantization, tmp_path)


def compare(machine: Machine, command: list[str], foreign: Target, quantization: str, folder: Path) -> None:
    """The logits of `foreign`'s library on its machine against transformers', as near as cpu-x86_64's own are."""
    model = llama.transformers_llama()
    structure, format_ = llama.structure_of(model), llama.QUANTIZATIONS[quantization]
    library = llama.build_library(structure, format_, folder / "library", foreign)
    given, reference = machines.packed(model, format_)
    ids = list(range(7, 27))
    got = machines.run(machine, command, library, given, ids, folder)
    expected = llama.reference_logits(reference, ids)[-5:]
    bound = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}[format_.model_dtype]
    assert np.abs(got - expected).max() < bound * expected.std()
