"""A budget spent: the choice is the best there is, and its bits are those of the tensors that it makes."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from math import prod

import numpy as np
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import count, parameters
from mlcbuild.models.structure import Structure
from mlcbuild.quantization import budget
from mlcbuild.quantization.schemes import quantized_parameters
from mlcbuild.recipes.types import Quantization, quantization_from_json, quantization_json
from tests.support import llama

NAMES = ("q4f16_1", "q3f16_1", "q0f16")
BUDGET = replace(
    llama.QUANTIZATIONS["q4f16_1"],
    bits_per_weight=6.0,
    formats=tuple((name, llama.QUANTIZATIONS[name].weights) for name in NAMES),
)
_BYTES = {"float16": 2, "uint32": 4}


@pytest.fixture(scope="module")
def structure() -> Structure:
    return llama.structure_of(llama.transformers_llama(num_hidden_layers=3, tie_word_embeddings=False))


def size(structure: Structure, quantization: Quantization) -> int:
    made = quantized_parameters(parameters(structure), quantization)
    return 8 * sum(prod(each.shape) * _BYTES[each.dtype] for each in made)


@pytest.fixture(scope="module")
def every(structure: Structure) -> list[tuple[dict[str, str], float]]:
    """All choices there are, and the bits a parameter that each takes."""
    kinds, numbers = budget.kinds(parameters(structure), BUDGET), count(structure)
    choices = [dict(zip(kinds, names, strict=True)) for names in itertools.product(NAMES, repeat=len(kinds))]
    return [(choice, size(structure, budget.resolved(BUDGET, choice)) / numbers) for choice in choices]


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_of_all(
    structure: Structure, every: list[tuple[dict[str, str], float]], seed: int
) -> None:
    random = np.random.default_rng(seed)
    taken = budget.bits(parameters(structure), BUDGET)
    kinds = budget.kinds(parameters(structure), BUDGET)
    assert kinds == ["embedding", "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"]
    lost = {kind: {name: float(random.random()) for name in NAMES} for kind in kinds}
    most, numbers = float(random.uniform(4.6, 16)), count(structure)
    fit = [
        (sum(lost[kind][name] for kind, name in choice.items()), bits, choice) for choice, bits in every if bits <= most
    ]
    loss, bits, choice = min(fit, key=lambda each: each[:2])
    found = budget.choose(most, taken, lost, numbers)
    assert found[:2] == (choice, bits) and found[2] == pytest.approx(loss)


def test_what_no_choice_keeps(structure: Structure) -> None:
    taken = budget.bits(parameters(structure), BUDGET)
    lost = {kind: dict.fromkeys(NAMES, 1.0) for kind in taken if kind}
    least = size(structure, budget.resolved(BUDGET, dict.fromkeys(lost, "q3f16_1"))) / count(structure)
    least = math.ceil(100 * least) / 100
    expected = (
        f"bits_per_weight 2.5: this model takes {least:.2f} in the smallest of the formats; "
        "say at least so many, or name a format with fewer bits"
    )
    with pytest.raises(MlcBuildError, match=f"^{re.escape(expected)}$"):
        budget.choose(2.5, taken, lost, count(structure))
    few: dict[str, dict[str, int]] = {"": {"": 0}, "embedding": {"q4f16_1": 4511}}
    with pytest.raises(MlcBuildError, match=r"takes 4\.52 in the smallest"):
        budget.choose(4.51, few, {"embedding": {"q4f16_1": 1.0}}, 1000)
    assert budget.choose(4.52, few, {"embedding": {"q4f16_1": 1.0}}, 1000)[1] == 4.511, "as many as it said"


def test_a_step_is_given_the_choice_as_overrides() -> None:
    """The file holds what formats mean and not what they are called, so that equal choices are equal."""
    choice = {"embedding": "q3f16_1", "o_proj": "q0f16"}
    content = json.loads(json.dumps(budget.choice_json(BUDGET, choice)))

    class Artifact:
        def read_json(self, name: str) -> object:
            return {"choice.json": content}[name]

    fields = json.loads(json.dumps({"quantization": quantization_json(BUDGET)}))
    assert not {"bits_per_weight", "formats"} & fields["quantization"].keys()
    assert quantization_from_json(budget.fields_of(fields, {})).overrides == ()
    found = quantization_from_json(budget.fields_of(fields, {"budget": Artifact()}))
    assert found.overrides == budget.resolved(BUDGET, choice).overrides
    assert found.overrides == (("embedding", llama.QUANTIZATIONS["q3f16_1"].weights), ("o_proj", None))
