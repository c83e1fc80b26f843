"""Targets that no machine could build for are refused before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mlcbuild.compiler import tools
from mlcbuild.recipes import convert
from mlcbuild.recipes.types import Target

_TARGETS = Path(__file__).parents[2] / "recipes" / "targets"


def target(name: str) -> Target:
    return convert.target(name, yaml.safe_load((_TARGETS / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("name", sorted(path.stem for path in _TARGETS.glob("*.yaml")))
def test_nothing_is_wrong_with_the_stock_targets(name: str) -> None:
    assert tools.wrong(target(name)) is None


@pytest.mark.parametrize(
    ("triple", "text"),
    [
        ("x86-64-linux-gnu", "linker target x86-64-linux-gnu: `x86` is none of x86_64, aarch64"),
        ("x86_64-linus-gnu", "linker target x86_64-linus-gnu: `linus` is none of linux, macos, windows, ios"),
        ("aarch64-linux-gnu", "code is made for x86_64-linux-gnu, but linked for aarch64-linux-gnu"),
    ],
)
def test_a_wrong_triple(triple: str, text: str) -> None:
    cpu = target("cpu-x86_64")
    assert tools.wrong(replace(cpu, linker=replace(cpu.linker, target=triple))) == text


def test_vulkan_has_one_linker() -> None:
    vulkan = target("vulkan")
    wrong = tools.wrong(replace(vulkan, linker=replace(vulkan.linker, kind="tar")))
    assert wrong == "linker tar: Vulkan libraries are linked by zig"


def test_an_unknown_architecture() -> None:
    wrong = tools.wrong(replace(target("cuda"), architectures=("sm_90a", "sm_91")))
    assert wrong is not None and wrong.startswith("architecture sm_91: nvcc of CUDA 13 knows sm_75, sm_80,")
