"""Mixtures of experts layer by layer: layers of two kinds, and what runs through each expert."""

from __future__ import annotations

import numpy as np
import pytest

from mlcbuild.checkpoints.index import index
from mlcbuild.checkpoints.table import read_table
from mlcbuild.models.architecture import resolve
from mlcbuild.models.few_layers import one_layer
from mlcbuild.models.parameters import parameters
from mlcbuild.verify import layers
from mlcbuild.verify.importance import importance
from mlcbuild.verify.packed import Packed
from tests.architectures import deepseek
from tests.checkpoints.files import write
from tests.support.llama import QUANTIZATIONS, Array, architecture
from tests.verify.conftest import Case

WINDOWS = [list(range(5, 145)), [7, 8, 9, 3, 1], [300, 2, 4, 301, 12, 12, 12, 80] * 12]
STATE = deepseek.random_state(deepseek.CONFIG)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Three layers, the first of which has no experts."""
    folder = tmp_path_factory.mktemp("experts")
    structure = resolve(architecture("deepseek"), deepseek.CONFIG, {})
    path = write(folder / "model.safetensors", STATE)
    document = index(parameters(structure), read_table({path.name: path}, {path.name: "digest"}))
    return Case(None, structure, document, {"digest": path}, folder)


def test_a_library_has_a_layer_of_each_kind(case: Case) -> None:
    assert case.structure.layer_kinds == (0, 1, 1)
    one = one_layer(case.structure)
    assert one.layer_kinds == (0, 1) and one_layer(one) == one
    assert {p.role for p in parameters(one) if p.layer == 1} == {
        p.role for p in parameters(case.structure) if p.layer == 2
    }


@pytest.mark.slow
def test_both_sides_compute_the_whole_model(case: Case) -> None:
    def compared(quantization: str) -> layers.Layers:
        packed = Packed(case.package(quantization), parameters(case.structure), QUANTIZATIONS[quantization])
        ours = case.blocks(quantization), packed
        return layers.compare(case.structure, (case.blocks("q0f32"), case.checkpoint), ours, WINDOWS)

    exact = compared("q0f32")
    losses = []
    for ids in WINDOWS:
        logits = deepseek.logits(deepseek.CONFIG, STATE, ids)[:-1]
        top = logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, np.array(ids[1:])[:, None], 1)
        losses.append((np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top - chosen)[:, 0])
    assert exact.figures.reference_perplexity == pytest.approx(np.exp(np.concatenate(losses).mean()), rel=1e-5)
    assert max(exact.blocks.values()) == 0 and max(exact.tensors.values()) == 0
    rounded = compared("q8f32_1")
    assert 0 < rounded.tensors["model.layers.1.mlp.moe_gate_up_proj.weight"] < 0.01
    assert rounded.tensors["model.layers.1.mlp.gate.weight"] == 0
    assert 0 < rounded.blocks["layer 2"] < 0.1


@pytest.mark.slow
def test_importance_is_what_runs_through_each_expert(case: Case) -> None:
    seen: deepseek.Seen = {}
    for ids in WINDOWS:
        deepseek.logits(deepseek.CONFIG, STATE, ids, seen)
    found = importance(case.structure, case.blocks("q0f32"), case.checkpoint, WINDOWS)

    def expected(name: str) -> Array:
        return np.asarray((np.concatenate(seen[name]) ** 2).mean(0))

    at = "model.layers.2.mlp"
    for ours, theirs in (("moe_gate_up_proj", "gate_proj"), ("moe_down_proj", "down_proj")):
        each = np.stack([expected(f"{at}.experts.{e}.{theirs}.weight") for e in range(8)])
        np.testing.assert_allclose(found[f"{at}.{ours}.weight"], each, rtol=3e-3)
    np.testing.assert_allclose(
        found[f"{at}.shared_experts.down_proj.weight"], expected(f"{at}.shared_experts.down_proj.weight"), rtol=3e-3
    )
    np.testing.assert_allclose(
        found["model.layers.0.mlp.down_proj.weight"], expected("model.layers.0.mlp.down_proj.weight"), rtol=3e-3
    )
