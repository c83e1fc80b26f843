"""On the trained model that ships with mlcbuild: better rounding into the same bytes is better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.compiler.cpu.formats import format_of
from mlcbuild.runtime import load
from tests.compiler.kernels import LEVELS, rounds_many_rows
from tests.end_to_end.workspace import Workspace
from tests.support.llama import QUANTIZATIONS

pytestmark = pytest.mark.slow

EVALUATION = Path(__file__).parents[2] / "recipes" / "models" / "stories" / "evaluation.txt"


@pytest.mark.parametrize(("quantization", "most"), [("q3f16_1", 0.0145), ("q4f16_1", 0.003)])
def test_searched_scales_lose_less_and_error_feedback_least(
    workspace: Workspace, quantization: str, most: float
) -> None:
    """By KL divergence on text that calibration has not seen; all share one library."""
    names = [quantization, f"{quantization}-mse", f"{quantization}-calibrated", f"{quantization}-gptq"]
    for name in names:
        workspace.recipe(name, name, "stories")
    built = workspace.built("build", f"recipe={','.join(names)}")
    # None where another test has put it into the cache that they share.
    assert len([step for step in built if step.startswith("library:") and quantization in step]) <= 1
    folders = [workspace.root / "dist" / name for name in names]
    nearest, mse, calibrated, gptq = (json.loads((folder / "quality.json").read_text())["kl"] for folder in folders)
    assert nearest > 1.3 * mse and mse > calibrated and most >= gptq > 0
    libraries = {path.read_bytes() for folder in folders for path in folder.glob("*.so")}
    assert len(libraries) == 1
    assert {config(folder)["quantization"] for folder in folders} == {quantization}


@pytest.mark.parametrize("quantization", ["q4f16_1", "q4f32_1"])
def test_activations_of_8_bits_lose_little(workspace: Workspace, quantization: str, tmp_path: Path) -> None:
    """By KL divergence from the library that takes them as they are, on the same weights."""
    of = QUANTIZATIONS[quantization]
    if not rounds_many_rows(format_of(of.weights), of.model_dtype, 8, LEVELS["native"], tmp_path):
        pytest.skip("this processor multiplies floats where rows are many: it rounds in decoding only")
    workspace.recipe("exact", quantization, "stories", target="cpu-exact")
    workspace.recipe("rounded", quantization, "stories", target="cpu")
    workspace.built("build", "recipe=exact,rounded")
    exact, rounded = (load(workspace.root / "dist" / name) for name in ("exact", "rounded"))
    ids = exact.tokenizer.encode(EVALUATION.read_text()[:4000])[:500]
    p, q = (log_softmax(model.logits(ids)) for model in (exact, rounded))
    divergence = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    assert 1e-7 < divergence < 0.002


def log_softmax(logits: Any) -> Any:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def config(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*-MLC/mlc-chat-config.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found
