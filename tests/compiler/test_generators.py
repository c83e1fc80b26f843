"""What a TVM without some code generators lacks for a target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mlcbuild.compiler import generators, targets
from mlcbuild.compiler.generators import ADVICE, Generators
from mlcbuild.errors import Unavailable
from mlcbuild.recipes import convert

_TARGETS = Path(__file__).parents[2] / "recipes" / "targets"


@pytest.fixture(scope="module")
def present() -> Generators:
    return generators.installed()


def lacking(name: str, present: Generators) -> str | None:
    target = convert.target(name, yaml.safe_load((_TARGETS / f"{name}.yaml").read_text()))
    device = targets.resolve(target)
    return generators.lacking(device, target.host or device, present)


@pytest.mark.parametrize("name", sorted(path.stem for path in _TARGETS.glob("*.yaml")))
def test_the_wheel_has_all_that_stock_targets_need(name: str, present: Generators) -> None:
    assert lacking(name, present) is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, n) for n in ("cuda", "rocm", "metal", "opencl", "webgpu")] + [("cpu", "llvm"), ("iphone", "llvm")],
)
def test_a_tvm_without_a_device(name: str, kind: str, present: Generators) -> None:
    without = replace(present, devices=present.devices - {kind})
    assert lacking(name, without) == f"the TVM that is installed has no code generator for {kind}: {ADVICE}"


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ("cpu-x86_64", "x86_64"),
        ("cpu-aarch64", "aarch64"),
        ("iphone", "aarch64"),
        ("rocm", "amdgcn"),
        ("webgpu", "wasm32"),
    ],
)
def test_an_llvm_without_a_processor(name: str, processor: str, present: Generators) -> None:
    assert processor in present.processors
    without = replace(present, processors=present.processors - {processor})
    expected = f"the LLVM of the TVM that is installed has no code generator for {processor}: {ADVICE}"
    assert lacking(name, without) == expected


def test_a_step_says_it_before_it_generates_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mlcbuild.compiler.cpu import build as cpu_build
    from mlcbuild.compiler.gpu import build

    monkeypatch.setattr(generators, "installed", lambda: Generators(frozenset({"llvm"}), frozenset({"x86_64"})))
    stock = {
        n: convert.target(n, yaml.safe_load((_TARGETS / f"{n}.yaml").read_text())) for n in ("cpu-aarch64", "metal")
    }
    cpu, metal = stock["cpu-aarch64"], stock["metal"]
    lowered = tmp_path / "module.json"
    with pytest.raises(Unavailable, match="no code generator for metal"):
        build.build(lowered, metal.device, metal.host, metal.linker, tmp_path / "model.dylib", tmp_path)
    with pytest.raises(Unavailable, match=r"LLVM .* has no code generator for aarch64"):
        cpu_build.build(lowered, cpu.device, {}, cpu.linker, tmp_path / "model.so", tmp_path)
    assert not list(tmp_path.iterdir())
