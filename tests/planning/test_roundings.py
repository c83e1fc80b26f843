"""What a quantization adds to a plan: formats that are shared, the calibration text, error feedback, budgets."""

from __future__ import annotations

import json

import pytest

from tests.engine.workspace import CONFIG, Workspace
from tests.planning.planned import kinds, planned


def test_roundings_of_one_format_share_its_library(workspace: Workspace) -> None:
    """How weights were rounded, and the class of their bounds, is nothing to the code that computes with them."""
    names = ("q4f16_1", "q4f16_1-mse", "q4f16_1-calibrated", "mine")
    workspace.write("recipes/quantizations/mine.yaml", "format: q4f16_1\nrounding: mse\n")
    for name in names:
        workspace.write(f"recipes/{name}.yaml", f"model: tiny\nquantization: {name}\ntarget: cpu\n")
    found = planned(workspace, *names)
    goals = [found.goals[name].steps for name in names]
    assert len({goal["lower"] for goal in goals}) == len({goal["library"] for goal in goals}) == 1
    assert len({goal["quantize"] for goal in goals}) == 3  # `mine` means what q4f16_1-mse means
    fields = [found.steps[goal["package"]].fields for goal in goals]
    assert [each["quantization"] for each in fields] == list(names)
    assert {each["format"] for each in fields} == {"q4f16_1"}
    assert "mse" not in json.dumps(found.steps[goals[1]["lower"]].fields)


def test_calibration_is_a_step_of_the_recipes_that_need_it(workspace: Workspace) -> None:
    for name in ("q4f16_1-mse", "q4f16_1-calibrated"):
        workspace.write(f"recipes/{name}.yaml", f"model: tiny\nquantization: {name}\ntarget: cpu\n")
    assert "calibrate" not in kinds(planned(workspace, "q4f16_1-mse"))
    found = planned(workspace, "q4f16_1-calibrated")
    assert found.goals["q4f16_1-calibrated"].steps["calibrate"] == "calibrate:tiny"
    assert "calibrate:tiny" in found.steps["quantize:tiny-q4f16_1-calibrated"].producers
    (text,) = (item.path for item in found.steps["calibrate:tiny"].inputs if item.name == "text")
    assert text is not None and text.name == "calibration.txt"


def test_error_feedback_is_a_step_of_its_own(workspace: Workspace) -> None:
    """Of a model and a format, where calibration is of a model; both run on the text and the library of pieces."""
    for name in ("q4f16_1-gptq", "q3f16_1-gptq", "q4f16_mixed"):
        workspace.write(f"recipes/{name}.yaml", f"model: tiny\nquantization: {name}\ntarget: cpu\n")
    found = planned(workspace, "q4f16_1-gptq", "q3f16_1-gptq", "q4f16_mixed")
    assert "calibrate" not in kinds(found)
    rounds = [found.steps[goal.steps["round"]] for goal in found.goals.values()]
    assert {step.name for step in rounds} == {f"round:tiny-{name}" for name in found.goals}
    for goal, step in zip(found.goals.values(), rounds, strict=True):
        assert step.name in found.steps[goal.steps["quantize"]].producers
    assert len({item.step for step in rounds for item in step.inputs if item.name == "blocks"}) == 1
    assert {item.path.name for step in rounds for item in step.inputs if item.path} == {"calibration.txt"}


def test_a_budget_is_spent_by_a_step_of_its_own(workspace: Workspace) -> None:
    """By weights in its first format, which another recipe may share; what follows is given the choice alone."""
    for name in ("q5f16_auto", "q4f16_1-gptq"):
        workspace.write(f"recipes/{name}.yaml", f"model: tiny\nquantization: {name}\ntarget: cpu\n")
    found = planned(workspace, "q5f16_auto", "q4f16_1-gptq")
    steps = found.goals["q5f16_auto"].steps
    allocate = found.steps[steps["allocate"]]
    assert allocate.name == "allocate:tiny-q5f16_auto" and allocate.fields["bits_per_weight"] == 5
    assert found.goals["q4f16_1-gptq"].steps["quantize"] in allocate.producers
    assert kinds(found)["round"] == kinds(found)["quantize"] == 2
    for kind in ("round", "quantize", "lower"):
        (given,) = (item for item in found.steps[steps[kind]].inputs if item.step == allocate.name)
        assert (given.name, given.select) == ("budget", ("choice.json",))
    assert allocate.name in found.steps[steps["verify"]].producers
    assert "allocate" not in found.goals["q4f16_1-gptq"].steps


@pytest.mark.parametrize(
    ("quantization", "what", "instead"),
    [
        ("q5f16_auto", "a budget", "one of its formats, such as q4f16_1"),
        ("auto-mse", "a budget", "one of its formats, such as q4f16_1"),
        ("q4f16_1-gptq", "rounding `gptq`", "the same quantization without it, or with `rounding: mse`"),
        ("q4f32_0-gptq", "rounding `gptq`", "the same quantization without it"),
    ],
)
def test_models_that_are_not_run_layer_by_layer(
    workspace: Workspace, quantization: str, what: str, instead: str
) -> None:
    """A decoder whose layers share keys is one; nothing is advised that would be refused too."""
    from transformers import Gemma3nTextConfig

    workspace.write("recipes/quantizations/auto-mse.yaml", "format: q5f16_auto\nrounding: mse\n")
    workspace.write("recipes/quantizations/q4f32_0-gptq.yaml", "format: q4f32_0\nrounding: gptq\n")
    rwkv = {"model_type": "rwkv", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "context_length": 64}
    for name, config in (
        ("rwkv", {**rwkv, "intermediate_size": 128, "attention_hidden_size": 64}),
        ("gemma3n_text", Gemma3nTextConfig(num_hidden_layers=10, num_kv_shared_layers=2).to_dict()),
    ):
        workspace.write(f"recipes/models/{name}/config.json", json.dumps(config))
        workspace.write(f"recipes/models/{name}.yaml", f"source: {{path: {name}}}\ntemplate: chatml\n")
        workspace.write(f"recipes/{name}.yaml", f"model: {name}\nquantization: {quantization}\ntarget: cpu\n")
        text = f"{what} runs a model layer by layer, and {name} cannot be run so: choose {instead}"
        assert planned(workspace, name).broken == {name: f"model {name}: {text}"}


def test_a_budget_of_a_model_of_texts(workspace: Workspace) -> None:
    config = json.dumps({**CONFIG, "model_type": "qwen3", "head_dim": 16})
    workspace.write("recipes/models/texts/config.json", config)
    text = "source: {path: texts}\ntemplate: chatml\narchitecture: qwen3-embedding\n"
    workspace.write("recipes/models/texts.yaml", text)
    for name in ("q5f16_auto", "q4f16_1-gptq"):
        workspace.write(f"recipes/{name}.yaml", f"model: texts\nquantization: {name}\ntarget: cpu\n")
    found = planned(workspace, "q5f16_auto", "q4f16_1-gptq")
    assert found.broken == {
        "q5f16_auto": "model texts: a budget is spent by what the probabilities of the next token lose, and this model "
        "gives vectors of texts: choose one of its formats, such as q4f16_1"
    }
    assert list(found.goals) == ["q4f16_1-gptq"]


def test_static_libraries_of_budgets_are_told_apart(workspace: Workspace) -> None:
    workspace.write("recipes/models/other.yaml", "extends: tiny\nsource: {path: tiny}\ncalibration: {text: own.txt}\n")
    workspace.write("recipes/models/own.txt", "My own text.")
    for model in ("tiny", "other"):
        workspace.write(f"recipes/{model}-iphone.yaml", f"model: {model}\nquantization: q5f16_auto\ntarget: iphone\n")
    found = planned(workspace, "tiny-iphone", "other-iphone")
    libraries = [found.steps[goal.steps["library"]] for goal in found.goals.values()]
    prefixes = {step.fields["prefix"] for step in libraries}
    assert len(prefixes) == 2 and all("q5f16_auto" in each for each in prefixes)


def test_models_calibration_text(workspace: Workspace) -> None:
    mine = workspace.write("recipes/models/mine.txt", "My own text.")
    workspace.write("recipes/models/own.yaml", "extends: tiny\nsource: {path: tiny}\ncalibration: {text: mine.txt}\n")
    workspace.write("recipes/own.yaml", "model: own\nquantization: q4f16_1-calibrated\ntarget: cpu\n")
    (text,) = (i.path for i in planned(workspace, "own").steps["calibrate:own"].inputs if i.name == "text")
    assert text == mine
