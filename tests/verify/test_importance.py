"""What calibration measures, against hooks in transformers' own model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.verify.importance import importance
from tests.verify.conftest import WINDOWS, Case

SOURCES = {
    "self_attn.qkv_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}


def hooked(case: Case) -> dict[str, Any]:
    """The mean square of each linear's inputs, by MLC's name."""
    import torch

    sums: dict[str, Any] = {}
    modules = dict(case.model.named_modules())
    names = {
        f"model.layers.{i}.{ours}.weight": f"model.layers.{i}.{theirs}"
        for i in range(3)
        for ours, theirs in SOURCES.items()
    }
    head = "model.embed_tokens.weight" if case.structure.tie_word_embeddings else "lm_head.weight"
    handles = []
    for ours, theirs in {**names, head: "lm_head"}.items():

        def hook(module: Any, inputs: Any, ours: str = ours) -> None:
            sums[ours] = sums.get(ours, 0) + (inputs[0][0].double() ** 2).sum(0).numpy()

        handles.append(modules[theirs].register_forward_pre_hook(hook))
    with torch.no_grad():
        for ids in WINDOWS:
            case.model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: total / sum(map(len, WINDOWS)) for name, total in sums.items()}


def test_mean_squares_are_those_of_transformers(case: Case) -> None:
    found = importance(case.structure, case.blocks("q0f32"), case.checkpoint, WINDOWS)
    expected = hooked(case)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32 and found[name].shape == values.shape
        np.testing.assert_allclose(found[name], values, rtol=1e-3)  # half a step of ten bits


def test_figures_are_rounded(case: Case) -> None:
    found = importance(case.structure, case.blocks("q0f32"), case.checkpoint, WINDOWS)
    for values in found.values():
        mantissa, _ = np.frexp(values)
        assert (mantissa * 1024 == np.round(mantissa * 1024)).all()


def test_a_text_with_nothing_in_it(case: Case) -> None:
    with pytest.raises(MlcBuildError, match="the text has no document of two tokens or more"):
        importance(case.structure, case.blocks("q0f32"), case.checkpoint, [])
