"""What each kind of matrix costs, against transformers' own model with these matrices in it."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import Parameter, parameters
from mlcbuild.quantization import group
from mlcbuild.verify.packed import Packed
from mlcbuild.verify.pieces import Float32
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


class Watched(Packed):
    """Which rows of the embedding are unpacked."""

    read: list[tuple[int, int]]

    def rows(self, parameter: Parameter, start: int, stop: int) -> Float32:
        if parameter.role == "embedding":
            self.read.append((start, stop))
        return super().rows(parameter, start, stop)


def test_shares_are_those_of_transformers(case: Case) -> None:
    known = parameters(case.structure)
    rounded = Watched(case.package("q4f16_1"), known, BUDGET)
    rounded.read = []
    found = Measurement(case.structure, BUDGET, case.blocks("q0f32"), case.checkpoint, rounded).run(WINDOWS)
    kinds = [kind for kind in PARTS if kind != "lm_head" or not case.structure.tie_word_embeddings]
    assert sorted(found) == sorted(kinds)
    for kind, of in found.items():
        assert of["q4f16_1"] == pytest.approx(divergence(case, kind), rel=0.01), kind
        # 7 steps of a scale are 127: a square of 1 / 329.
        assert of["q8f16_1"] == pytest.approx(of["q4f16_1"] / 329, rel=0.2) and of["q0f16"] == 0
    used = np.unique(np.concatenate(WINDOWS)) // 8 * 8
    first = rounded.read[: len(set(used))]
    assert first == [(start, start + 8) for start in np.unique(used)], "rows that occur, and those around them"
    assert case.structure.tie_word_embeddings or rounded.read == first, "as an output matrix it is read whole"


def test_texts_are_beginnings_of_documents_from_all_over() -> None:
    documents = [list(range(1000 * n, 1000 * n + 300)) for n in range(10)]
    found = some(documents, 4096)
    assert [len(each) for each in found] == [128] * 8
    assert [each[0] for each in found] == [0, 1000, 2000, 3000, 5000, 6000, 7000, 8000]
    assert [len(each) for each in some([[1] * 2000, [2]], 4096)] == [1024]
    assert {len(each) for each in some(documents, 50)} == {50}
    assert some([[1, 2, 3], [4], [5, 6]], 4096) == [[1, 2, 3]], "two tokens make no figure of every other position"


def test_many_short_documents_make_as_long_a_text() -> None:
    """One long one among them was all that was taken."""
    documents = [[number] * 100 for number in range(1000)]
    documents.insert(500, [0] * 200)
    found = some(documents, 4096)
    assert [len(each) for each in found] == [100] * 5 + [128] + [100] * 4
    assert [each[0] for each in found if len(each) == 100] == [0, 111, 222, 333, 444, 555, 666, 777, 888]


def test_a_text_that_says_nothing() -> None:
    expected = (
        "the calibration text has no document of 3 tokens or more, and a budget is spent by what it measures on one: "
        "give the model's file another text (`calibration: {text: FILE}`)"
    )
    for documents in ([], [[1, 2], [3]]):
        with pytest.raises(MlcBuildError) as raised:
            some(documents, 4096)
        assert str(raised.value) == expected
