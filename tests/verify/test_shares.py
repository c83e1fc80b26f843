"""What each kind of matrix costs, against transformers' own model with these matrices in it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from mlcbuild.models.parameters import parameters
from mlcbuild.quantization import group
from mlcbuild.verify.packed import Packed
from mlcbuild.verify.shares import Measurement, some
from tests.support import llama
from tests.verify.conftest import WINDOWS, Case

NAMES = ("q4f16_1", "q8f16_1", "q0f16")
BUDGET = replace(
    llama.QUANTIZATIONS["q4f16_1"],
    formats=tuple((name, llama.QUANTIZATIONS[name].weights) for name in NAMES),
)
# MLC's kinds, and what transformers calls their parts.
PARTS = {
    "embedding": ("embed_tokens",),
    "lm_head": ("lm_head",),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}


def divergence(case: Case, kind: str) -> float:
    """Mean over every other position, but for the last of each window."""
    import torch

    changed = copy.deepcopy(case.model)  # a tied model stays tied
    weights = BUDGET.weights
    assert weights is not None
    with torch.no_grad():
        for name, module in changed.named_modules():
            if name.endswith(PARTS[kind]):
                values = module.weight.numpy().copy()
                packed = group.encode(values, "float32", weights, "float16")
                module.weight.copy_(torch.from_numpy(group.decode(packed, values.shape[1], weights, "float16")))
        total, tokens = 0.0, 0
        for ids in WINDOWS:
            both = (m(torch.tensor([ids])).logits[0, ::2][:-1].double() for m in (case.model, changed))
            p, q = (torch.log_softmax(logits, -1) for logits in both)
            total += float((p.exp() * (p - q)).sum())
            tokens += len(p)
    return total / tokens


def test_shares_are_those_of_transformers(case: Case) -> None:
    known = parameters(case.structure)
    rounded = Packed(case.package("q4f16_1"), known, BUDGET)
    found = Measurement(case.structure, BUDGET, case.blocks("q0f32"), case.checkpoint, rounded).run(WINDOWS)
    kinds = [kind for kind in PARTS if kind != "lm_head" or not case.structure.tie_word_embeddings]
    assert sorted(found) == sorted(kinds)
    for kind, of in found.items():
        assert of["q4f16_1"] == pytest.approx(divergence(case, kind), rel=0.01), kind
        # 7 steps of a scale are 127: a square of 1 / 329.
        assert of["q8f16_1"] == pytest.approx(of["q4f16_1"] / 329, rel=0.2) and of["q0f16"] == 0


def test_texts_are_beginnings_of_documents_from_all_over() -> None:
    documents = [list(range(1000 * n, 1000 * n + 300)) for n in range(10)]
    found = some(documents, 4096)
    assert [len(each) for each in found] == [128] * 8
    assert [each[0] for each in found] == [0, 1000, 2000, 3000, 5000, 6000, 7000, 8000]
    assert [len(each) for each in some([[1] * 2000, [2]], 4096)] == [1024]
    assert {len(each) for each in some(documents, 50)} == {50}
    assert some([[1, 2, 3], [4], [5, 6]], 4096) == [[1, 2, 3], [5, 6]]
    assert some([], 4096) == []
