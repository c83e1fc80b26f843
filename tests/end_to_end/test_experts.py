"""A mixture of experts from a checkpoint to a verified package, the way a user builds it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlcbuild.runtime import load
from tests.architectures.test_experts import QWEN2
from tests.end_to_end.workspace import Workspace
from tests.runtime.conftest import byte_level_tokenizer

pytestmark = pytest.mark.slow

IDS = [5, 17, 1, 280, 33, 33, 9, 101, 64, 7]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen2_moe whose second layer has no experts; with `logits.npy`, transformers' own."""
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints") / "mixture"
    config = Qwen2MoeConfig(**{**QWEN2, "vocab_size": 300}, initializer_range=0.1)
    Qwen2MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    model = Qwen2MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    with torch.no_grad():
        np.save(folder.parent / "logits.npy", model(torch.tensor([IDS])).logits[0].numpy())
    return folder


def test_it_is_built_and_verified_whole_and_layer_by_layer(workspace: Workspace, checkpoint: Path) -> None:
    workspace.model("mixture", checkpoint)
    workspace.model("large", checkpoint, "verify: {gate: report, memory: 0}\n")
    for model in ("mixture", "large"):
        workspace.recipe(f"{model}-cpu", "q4f16_1", model)
    workspace.recipe("exact-cpu", "q0f32", "mixture")
    workspace.recipe("calibrated-cpu", "q4f16_1-calibrated", "mixture")
    workspace.recipe("gptq-cpu", "q4f16_1-gptq", "mixture")
    workspace.recipe("budget-cpu", "q5f16_auto", "large")
    workspace.doit("build")
    names = ("mixture", "large", "exact", "calibrated", "gptq", "budget")
    quality = {
        name: json.loads((workspace.root / "dist" / f"{name}-cpu" / "quality.json").read_text()) for name in names
    }
    whole, layers = quality["mixture"], quality["large"]
    assert (whole["method"], layers["method"]) == ("whole", "layers")
    for name in ("kl", "top1_agreement", "perplexity", "reference_perplexity", "tokens"):
        assert layers[name] == whole[name], name
    assert list(layers["relative_error"]["blocks"]) == ["embedding", "layer 0", "layer 1", "layer 2", "final norm"]
    assert quality["exact"]["kl"] == 0 < quality["calibrated"]["kl"] < whole["kl"]
    assert 0 < quality["gptq"]["kl"] < quality["calibrated"]["kl"]
    spent = quality["budget"]["budget"]
    (index,) = (workspace.root / "dist" / "budget-cpu").glob("*-MLC/tensor-cache.json")
    assert json.loads(index.read_text())["metadata"]["BitsPerParam"] == pytest.approx(
        spent["bits_per_weight"], abs=1e-3
    )
    assert quality["budget"]["method"] == "layers" and spent["bits_per_weight"] <= 5
    assert len(set(spent["formats"].values())) > 1 and quality["budget"]["kl"] < whole["kl"]
    logits = load(workspace.root / "dist" / "exact-cpu").logits(IDS)
    expected = np.load(checkpoint.parent / "logits.npy")
    assert np.abs(logits - expected).max() <= 1e-4 * expected.std()
