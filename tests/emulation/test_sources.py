"""Every kernel of whole Metal and OpenCL libraries is accepted by the headers that stand for these languages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlcbuild.compiler.gpu.lower import lower
from mlcbuild.models.architecture import resolve
from mlcbuild.recipes.load import load
from tests.architectures.agreement import config_of
from tests.architectures.test_agreement import CASES
from tests.support import llama
from tests.support.gpus import machine

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
WIDE = {"hidden_size": 128, "head_dim": 32}


def lowered(name: str, quantization: str, device: Any) -> Any:
    case = CASES[name]
    structure = resolve(llama.architecture(case.architecture), {**config_of(case), **WIDE}, {"context_window_size": 64})
    return lower(structure, llama.QUANTIZATIONS[quantization], quantization, device)


def source(module: Any, device: Any) -> str:
    """The device's source of a lowered module."""
    from tvm import relax, target, transform

    both = target.Target(dict(device), host={"kind": "llvm", "mtriple": "x86_64-linux-gnu"})
    with both, transform.PassContext(config={"tirx.disable_cse_tir": True}):
        waiting = [relax.build(module, target=both, relax_pipeline=None).mod]
    found = []
    while waiting:
        each = waiting.pop()
        waiting += list(each.imports)
        if each.kind == device["kind"]:
            found.append(each.inspect_source())
    assert len(found) == 1
    return str(found[0])


@pytest.mark.parametrize("target", ["metal", "opencl"])
@pytest.mark.parametrize(("name", "quantization"), [("gemma2", "q4f16_1"), ("mixtral", "q4f32_0")])
def test_every_kernel_of_a_library_compiles(target: str, name: str, quantization: str) -> None:
    device = load(ROOT).targets[target].device
    kernels = machine().load(source(lowered(name, quantization, device), device), target)
    assert len(kernels) > 40
    assert {"attention_prefill_kernel", "attention_decode_kernel", "linear_kernel_2"} <= set(kernels)


def test_mali_and_android_have_the_kernels_of_opencl() -> None:
    """So what is executed for one is executed for all."""
    targets = load(ROOT).targets
    assert targets["android"].device == targets["opencl"].device
    devices = (targets["opencl"].device, targets["mali"].device)
    first, second = (source(lowered("llama", "q4f16_1", device), device) for device in devices)
    assert first == second
