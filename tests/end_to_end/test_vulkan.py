"""The shipped model on Vulkan: its packaged library, run by TVM's own Vulkan runtime on a software device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlcbuild.runtime import load
from tests.end_to_end.workspace import Workspace, make_workspace
from tests.support.spirv import lavapipe

pytestmark = pytest.mark.slow

RUNTIME = "MLCBUILD_TEST_VULKAN_RUNTIME"  # a libtvm_runtime_vulkan that fits the installed apache-tvm
ROOT = Path(__file__).parents[2]
TEXT = "Once upon a time there was a little boat that wanted to see the whole wide sea. "
LIMITS = {"q4f16_1": 2e-2, "q4f32_1": 2e-5, "q0f16": 2e-2, "q0f32": 2e-5}  # of the logits' standard deviation


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path, tiny_checkpoint: Path) -> Workspace:
    if not os.environ.get(RUNTIME):
        # Also where MLCBUILD_TEST_TOOLS=required: no package has such a runtime, so CI cannot install one.
        pytest.skip(f"{RUNTIME} names no TVM runtime with Vulkan")
    workspace = make_workspace(tmp_path_factory.mktemp("vulkan"), shared_cache, tiny_checkpoint)
    stories = ROOT / "recipes" / "models" / "stories"
    text = os.path.relpath(stories / "evaluation.txt", workspace.root / "recipes" / "models")
    workspace.model("stories", stories, f"verify: {{text: {text}}}\n")
    names = [(quantization, target) for quantization in LIMITS for target in ("vulkan", "cpu-exact")]
    for quantization, target in names:
        workspace.recipe(f"{quantization}-{target}", model="stories", quantization=quantization, target=target)
    workspace.doit("build", f"recipe={','.join(f'{q}-{target}' for q, target in names)}")
    return workspace


@pytest.mark.parametrize("quantization", LIMITS)
def test_every_logit_is_the_cpus(stories: Workspace, quantization: str, tmp_path: Path) -> None:
    """Decoded one by one, and prefilled in chunks of several sizes."""
    vulkan, cpu = (stories.root / "dist" / f"{quantization}-{target}" for target in ("vulkan", "cpu-exact"))
    model = load(cpu)
    ids = np.asarray(model.tokenizer.encode(TEXT * 3), np.int32)
    expected = model.logits(ids.tolist())
    (library,) = vulkan.glob("*.so")
    (weights,) = vulkan.glob("*-MLC")
    files, whole = (library, weights, tmp_path / "arrays.npz"), len(ids)
    for chunks in ([whole], [1] * whole, [7, 1, 2, whole - 10]):
        np.savez(files[-1], ids=ids, chunks=chunks)
        command = [sys.executable, "-m", "tests.support.vulkan_model", os.environ[RUNTIME], *map(str, files)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **lavapipe()}, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-4000:]
        with np.load(files[-1]) as written:
            got = written["logits"]
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() < LIMITS[quantization] * expected.std(), chunks[:3]
