"""An architecture file whose parameters are not what its decoder computes with is refused while planning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models import architecture
from tests.architectures import sink_cases
from tests.architectures.agreement import config_of, known_architectures
from tests.architectures.family_cases import CASES
from tests.models.test_architecture import CONFIG
from tests.support import llama

Data = dict[str, Any]
Change = Callable[[Data], object]
NEEDED = "and the decoder needs it; names with `{i}` are of layers"
UNUSED = "of which the decoder makes no use"
NORM = {"role": "attention_norm_bias", "name": "model.layers.{i}.input_layernorm.bias"}


def rule(data: Data, role: str) -> Data:
    found: Data = next(each for each in data["parameters"] if each["role"] == role)
    return found


def without(role: str) -> Change:
    return lambda data: data["parameters"].remove(rule(data, role))


def renamed(role: str, name: str) -> Change:
    return lambda data: rule(data, role).update(name=name)


def chosen(**choices: Any) -> Change:
    return lambda data: data["decoder"].update(choices)


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (without("down_proj"), [f"no parameter has the role `down_proj` in layer 0, {NEEDED}"]),
        (without("embedding"), [f"no parameter has the role `embedding` outside the layers, {NEEDED}"]),
        (without("final_norm"), [f"no parameter has the role `final_norm` outside the layers, {NEEDED}"]),
        (without("mlp_norm"), [f"no parameter has the role `mlp_norm` in layer 0, {NEEDED}"]),
        (without("lm_head"), [f"no parameter has the role `lm_head` outside the layers, {NEEDED}"]),
        (
            renamed("down_proj", "model.down_proj.weight"),
            [
                f"a parameter has the role `down_proj`, {UNUSED} outside the layers",
                f"no parameter has the role `down_proj` in layer 0, {NEEDED}",
            ],
        ),
        (renamed("final_norm", "lm_head.weight"), ["two parameters are called lm_head.weight"]),
        (
            lambda data: data["parameters"].append({"role": "lm_head", "name": "head.weight"}),
            ["two parameters have the role `lm_head`: lm_head.weight and head.weight"],
        ),
        (
            chosen(mlp="plain"),
            [
                f"no parameter has the role `up_proj` in layer 0, {NEEDED}",
                f"a parameter has the role `gate_up_proj`, {UNUSED} in layer 0",
            ],
        ),
        (
            chosen(qk_norm="head"),
            [f"no parameter has the role `{role}` in layer 0, {NEEDED}" for role in ("k_norm", "q_norm")],
        ),
        (
            chosen(norm_position="post"),
            [
                *(f"no parameter has the role `{b}_post_norm` in layer 0, {NEEDED}" for b in ("attention", "mlp")),
                *(f"a parameter has the role `{b}_norm`, {UNUSED} in layer 0" for b in ("attention", "mlp")),
            ],
        ),
        (
            lambda data: data["parameters"].append(NORM),  # rms norms have none
            [f"a parameter has the role `attention_norm_bias`, {UNUSED} in layer 0"],
        ),
    ],
)
def test_parameters_that_are_not_those_of_the_decoder(change: Change, problems: list[str]) -> None:
    known = llama.architecture()
    data = copy.deepcopy(dict(known.data))
    change(data)
    with pytest.raises(MlcBuildError) as error:
        architecture.resolve(replace(known, data=data), CONFIG, {})
    assert str(error.value).splitlines() == [f"recipes/architectures/llama.yaml: {problem}" for problem in problems]


def test_latent_attention_needs_its_parameters() -> None:
    known = llama.architecture("deepseek_v3")
    config = config_of(CASES["deepseek_v3"])
    kept = [each for each in known.data["parameters"] if each["role"] not in ("q_a_norm", "kv_b_proj")]
    with pytest.raises(MlcBuildError) as error:
        architecture.resolve(replace(known, data={**known.data, "parameters": kept}), config, {})
    lines = [
        f"no parameter has the role `{role}` in layer {i}, {NEEDED}"
        for i in (0, 1)
        for role in ("kv_b_proj", "q_a_norm")
    ]
    assert str(error.value).splitlines() == [f"recipes/architectures/deepseek_v3.yaml: {line}" for line in lines]


def test_what_a_choice_makes_optional() -> None:
    """Layer norms without weights, as OLMo's; one norm for both where attention and MLP are side by side."""
    known = llama.architecture()
    data = copy.deepcopy(dict(known.data))
    without("mlp_norm")(data)
    chosen(residual="parallel")(data)
    assert architecture.resolve(replace(known, data=data), CONFIG, {}).residual == "parallel"
    for role in ("attention_norm", "final_norm"):
        without(role)(data)
    chosen(norm="layer")(data)
    data["parameters"].append(NORM)
    assert "attention_norm_bias" in architecture.resolve(replace(known, data=data), CONFIG, {}).roles()


def test_layers_borrow_keys_of_earlier_ones_of_their_type() -> None:
    config = {**config_of(sink_cases.CASES["gemma4_text-shared"]), "num_kv_shared_layers": 4}
    wanted = "layer 0 is to read the keys and values of layer -1, expected those of an earlier layer of its type"
    with pytest.raises(MlcBuildError, match=wanted):
        architecture.resolve(architecture.choose(known_architectures(), config), config, {})
