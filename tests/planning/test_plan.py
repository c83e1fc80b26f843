"""Recipes become steps, each once."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mlcbuild.errors import MlcBuildError, Unavailable
from mlcbuild.planning.planner import plan
from mlcbuild.planning.shapes import read_config
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import Locked, LockedFile, Recipe
from tests.engine.workspace import CONFIG, REPOSITORY, Workspace
from tests.planning.planned import kinds, no_hub, planned


def test_the_steps_of_one_recipe(workspace: Workspace) -> None:
    found = planned(workspace, "tiny-q4f16_1-cpu")
    (label,) = {name.split(":")[1].removesuffix("-q4f16_1-cpu") for name in found.steps if "q4f16_1-cpu" in name} - {
        "tiny"
    }
    assert label.startswith("llama-")
    assert list(found.goals["tiny-q4f16_1-cpu"].steps.items()) == [
        ("download", "download:tiny"),
        ("convert", "convert:tiny"),
        ("quantize", "quantize:tiny-q4f16_1"),
        ("lower", f"lower:{label}-q4f16_1-cpu"),
        ("library", f"library:{label}-q4f16_1-cpu"),
        ("package", "package:tiny-q4f16_1-cpu"),
        ("measure", "measure:tiny-q4f16_1-cpu"),
        ("verify", "verify:tiny-q4f16_1-cpu"),
    ]
    assert set(found.steps) - set(found.goals["tiny-q4f16_1-cpu"].steps.values()) == {
        f"lower:{label}-q0f32-cpu",
        f"library:{label}-q0f32-cpu",
    }


def test_steps_come_in_an_order_in_which_they_can_run(workspace: Workspace) -> None:
    found = planned(workspace)
    seen: set[str] = set()
    for name, step in found.steps.items():
        assert set(step.producers) <= seen, name
        seen.add(name)
    assert found.closure(["package:tiny-q4f16_1-cpu"])[-1] == "package:tiny-q4f16_1-cpu"
    assert "verify:tiny-q4f16_1-cpu" not in found.closure(["package:tiny-q4f16_1-cpu"])


def test_a_variant_of_the_same_structure_shares_the_library(workspace: Workspace) -> None:
    """Other weights and another vocabulary: convert, quantize and package again, and no library."""
    workspace.write("recipes/models/variant.yaml", "source: {path: variant}\ntemplate: chatml\n")
    workspace.write("recipes/models/variant/config.json", json.dumps({**CONFIG, "vocab_size": 300}))
    workspace.write("recipes/variant.yaml", "model: variant\nquantization: q4f16_1\ntarget: cpu\n")
    counts = kinds(planned(workspace, "tiny-q4f16_1-cpu", "variant"))
    assert counts == {
        "download": 2,
        "convert": 2,
        "quantize": 2,
        "lower": 2,
        "library": 2,
        "package": 2,
        "measure": 2,
        "verify": 2,
    }


def test_an_override_changes_the_library_and_not_the_weights(workspace: Workspace) -> None:
    workspace.write(
        "recipes/small.yaml",
        "model: tiny\nquantization: q4f16_1\ntarget: cpu\noverrides: {context_window_size: 64}\n",
    )
    counts = kinds(planned(workspace, "tiny-q4f16_1-cpu", "small"))
    assert counts == {
        "download": 1,
        "convert": 1,
        "quantize": 1,
        "lower": 4,
        "library": 4,
        "package": 2,
        "measure": 2,
        "verify": 2,
    }


def test_recipes_that_mean_the_same_are_one(workspace: Workspace) -> None:
    workspace.write("recipes/again.yaml", "model: tiny\nquantization: q4f16_1\ntarget: cpu\n")
    found = planned(workspace, "tiny-q4f16_1-cpu", "again")
    assert found.goals["again"].steps == found.goals["tiny-q4f16_1-cpu"].steps
    assert set(kinds(found).values()) == {1, 2}


def test_names_that_would_clash_are_told_apart(workspace: Workspace) -> None:
    """Two targets of one kind of device give two modules for one structure and quantization."""
    workspace.write("recipes/other.yaml", "model: tiny\nquantization: q4f16_1\ntarget: cpu-x86_64\n")
    found = planned(workspace, "tiny-q4f16_1-cpu", "other")
    modules = [name for name in found.steps if name.startswith("lower:") and "q4f16_1" in name]
    assert len(modules) in (1, 2)  # one, on a machine that is exactly an x86-64-v3
    assert len(set(modules)) == len(modules)


def test_what_reaches_the_measurement_and_what_only_the_verdict(workspace: Workspace) -> None:
    """FAULTS.md F: neither bounds nor the gate nor a template measure anything again."""

    def digests(**changes: Any) -> dict[str, Any]:
        return {name: (step.fields, step.inputs) for name, step in planned(workspace, **changes).steps.items()}

    def changed(**changes: Any) -> set[str]:
        before, after = digests(), digests(**changes)
        return {name.partition(":")[0] for name in before if before[name] != after[name]}

    text = workspace.write("text.txt", "Once upon a time")
    recipe: Recipe = load(workspace.root).recipes["tiny-q4f16_1-cpu"]
    for own in ({"kl": 0.5}, {"perplexity": 9.0}, {"gate": "report"}):
        assert changed(verify=dataclasses.replace(recipe.verify, **own)) == {"verify"}
    assert changed(verify=dataclasses.replace(recipe.verify, text=text)) == {"measure"}
    template = dataclasses.replace(recipe.template, name="other")
    assert changed(template=template) == {"package"}


def test_targets_that_do_not_run_here_share_one_measurement(workspace: Workspace) -> None:
    """FAULTS.md F: four GPUs of one model and format, and the CPU whose library stands in for them, measure once.

    So do CPUs that run elsewhere and the one here that rounds activations as they do.
    """
    names = ("opencl", "vulkan", "android", "metal")
    for name in (*names, "cpu-exact", "cpu-aarch64", "windows-x86_64"):
        workspace.write(f"recipes/{name}.yaml", f"model: tiny\nquantization: q4f16_1\ntarget: {name}\n")
    found = planned(workspace, *names, "cpu-exact")
    assert {name: kinds(found)[name] for name in ("package", "measure", "verify")} == {
        "package": 5,
        "measure": 1,
        "verify": 5,
    }
    executed = {name: found.steps[goal.steps["verify"]].fields["executed"] for name, goal in found.goals.items()}
    assert executed == {**dict.fromkeys(names, False), "cpu-exact": True}
    assert kinds(planned(workspace, "tiny-q4f16_1-cpu", "cpu-aarch64", "windows-x86_64"))["measure"] == 1
    assert kinds(planned(workspace, "tiny-q4f16_1-cpu", "cpu-exact"))["measure"] == 2
    stock = (REPOSITORY / "recipes/targets/cpu-aarch64.yaml").read_text()
    workspace.write("recipes/targets/fine.yaml", stock.replace("activation_bits: 8", "activation_bits: 16"))
    workspace.write("recipes/fine.yaml", "model: tiny\nquantization: q4f16_1\ntarget: fine\n")
    steps = planned(workspace, "fine").steps
    (stand_in,) = (step for name, step in steps.items() if name.startswith("lower:") and name.endswith("-cpu@16"))
    assert stand_in.fields["activation_bits"] == 16 and "measure:tiny-q4f16_1-cpu@16" in steps


@pytest.mark.parametrize(
    ("scaling", "noted"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, True),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0}, True),
        ({"rope_type": "linear", "factor": 4.0}, False),
    ],
)
def test_rope_that_depends_on_the_length_of_a_text_is_said(
    workspace: Workspace, scaling: dict[str, Any], noted: bool
) -> None:
    """FAULTS.md A13: it was in the docs and nowhere else."""
    config = {**CONFIG, "max_position_embeddings": 64, "original_max_position_embeddings": 64, "rope_scaling": scaling}
    workspace.write("recipes/models/long/config.json", json.dumps(config))
    for window in (64, 256):
        model = f"source: {{path: long}}\ntemplate: chatml\noverrides: {{context_window_size: {window}}}\n"
        workspace.write(f"recipes/models/m{window}.yaml", model)
        workspace.write(f"recipes/r{window}.yaml", f"model: m{window}\nquantization: q4f16_1\ntarget: cpu\n")
    found = planned(workspace, "r64", "r256")
    notes = {name: found.steps[goal.steps["verify"]].fields["notes"] for name, goal in found.goals.items()}
    assert notes["r64"] == [] and bool(notes["r256"]) == noted
    if noted:
        assert "as one of 256 tokens" in notes["r256"][0] and "{context_window_size: 64}" in notes["r256"][0]


@pytest.mark.parametrize(
    ("window", "said"),
    [
        (64, "the model chooses keys for each token. Within 64 tokens it chooses all"),
        (128, "the model chooses 64 keys for each token. Texts that it is measured with have 1024 tokens"),
    ],
)
def test_what_a_model_with_an_indexer_is_built_without_is_said(workspace: Workspace, window: int, said: str) -> None:
    config = {**CONFIG, "model_type": "deepseek_v32", "n_routed_experts": 16, "index_topk": 64, "q_lora_rank": 32}
    workspace.write("recipes/models/other/config.json", json.dumps(config))
    model = f"source: {{path: other}}\ntemplate: chatml\noverrides: {{context_window_size: {window}}}\n"
    workspace.write("recipes/models/other.yaml", model)
    workspace.write("recipes/other.yaml", "model: other\nquantization: q4f16_1\ntarget: cpu\n")
    (note,) = planned(workspace, "other").steps["verify:other"].fields["notes"]
    assert note.startswith(said)


def test_an_architecture_that_was_chosen_by_hand_is_said(workspace: Workspace) -> None:
    """FAULTS.md A14: a model_type that the architecture does not know, and keys that do not tell what differs."""
    workspace.write("recipes/models/other/config.json", json.dumps({**CONFIG, "model_type": "helium"}))
    workspace.write("recipes/models/other.yaml", "source: {path: other}\ntemplate: chatml\narchitecture: llama\n")
    workspace.write("recipes/other.yaml", "model: other\nquantization: q4f16_1\ntarget: cpu\n")
    (note,) = planned(workspace, "other").steps["verify:other"].fields["notes"]
    assert note.startswith("`architecture: llama` was chosen by hand for the model_type helium: nothing but")


def test_models_that_differ_in_their_names_are_measured_once(workspace: Workspace) -> None:
    """FAULTS.md F."""
    for number in range(100):
        workspace.write(f"recipes/models/m{number}.yaml", "source: {path: tiny}\ntemplate: chatml\n")
        workspace.write(f"recipes/r{number}.yaml", f"model: m{number}\nquantization: q4f16_1\ntarget: cpu\n")
    counts = kinds(planned(workspace, *(f"r{number}" for number in range(100))))
    assert (counts["quantize"], counts["measure"], counts["package"], counts["verify"]) == (1, 1, 100, 100)


def test_planning_grows_with_the_number_of_recipes(workspace: Workspace) -> None:
    """FAULTS E: 1,092 recipes took 1.4 s and 10,920 of them 30.7 s. What is counted are lines that run, not seconds."""
    for number in range(80):
        workspace.write(f"recipes/models/m{number}.yaml", "source: {path: tiny}\ntemplate: chatml\n")
        workspace.write(f"recipes/r{number}.yaml", f"model: m{number}\nquantization: q4f16_1\ntarget: cpu\n")
    catalog = load(workspace.root)

    def lines(recipes: int) -> int:
        ran, before = 0, sys.gettrace()

        def count(frame: FrameType, event: str, value: object) -> Any:
            nonlocal ran
            ran += 1
            return count

        sys.settrace(count)
        try:
            plan(catalog, [catalog.recipes[f"r{number}"] for number in range(recipes)], no_hub)
        finally:
            sys.settrace(before)
        return ran

    assert lines(80) <= 4.1 * lines(20)


def test_a_target_that_does_not_run_here_is_measured_by_another_library(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlcbuild.compiler.targets.runs_here", lambda target: False)
    workspace.write("recipes/other.yaml", "model: tiny\nquantization: q4f16_1\ntarget: cpu-x86_64\n")
    found = planned(workspace, "other")
    (measure,) = (step for step in found.steps.values() if step.kind == "measure")
    assert measure.name == "measure:tiny-q4f16_1-cpu"
    assert [item.name for item in measure.inputs][-1] == "library"


def test_a_large_model_is_verified_layer_by_layer(workspace: Workspace) -> None:
    """By a bound that the recipe declares, since quality.json shall not depend on the machine's memory."""
    recipe: Recipe = load(workspace.root).recipes["tiny-q4f16_1-cpu"]
    size = 4e-9 * 90_432  # GB that CONFIG takes as float32

    def method(memory: float) -> tuple[Any, list[str]]:
        verify = dataclasses.replace(recipe.verify, memory=memory)
        (step,) = (s for s in planned(workspace, recipe.name, verify=verify).steps.values() if s.kind == "measure")
        return step.fields["method"], [item.name for item in step.inputs]

    given = ["quantize", "checkpoint", "convert", "text", "reference"]
    assert method(2 * size) == ("whole", [*given, "library"])
    assert method(size / 2) == ("layers", [*given, "blocks"])


def test_the_pieces_of_models_that_differ_in_layers_only_are_one_library(workspace: Workspace) -> None:
    workspace.write("recipes/models/deep.yaml", "source: {path: deep}\ntemplate: chatml\n")
    workspace.write("recipes/models/deep/config.json", json.dumps({**CONFIG, "num_hidden_layers": 7}))
    for model in ("tiny", "deep"):
        text = f"model: {model}\nquantization: q4f16_1\ntarget: cpu\nverify: {{memory: 0}}\n"
        workspace.write(f"recipes/{model}.yaml", text)
    found = planned(workspace, "tiny", "deep")
    assert len([name for name in found.steps if name.startswith("library:") and "-blocks-" in name]) == 2


def test_a_target_that_this_machine_lacks_is_unavailable(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(target: object) -> dict[str, Any]:
        raise Unavailable("no such compiler: install it")

    monkeypatch.setattr("mlcbuild.compiler.targets.resolve", resolve)
    found = planned(workspace)
    assert found.goals == {}
    assert set(found.unavailable.values()) == {"no such compiler: install it"}


def test_a_hub_model_is_planned_from_its_lock(workspace: Workspace) -> None:
    workspace.write("recipes/models/tiny.yaml", "source: {hf: owner/tiny}\ntemplate: chatml\n")
    files = {"config.json": LockedFile("0" * 64, 10), "model.safetensors": LockedFile("1" * 64, 20)}
    catalog = load(workspace.root)
    found = plan(catalog, catalog.recipes.values(), lambda model: Locked("c" * 40, CONFIG, files))
    assert found.steps["download:tiny"].fields == {
        "repo": "owner/tiny",
        "commit": "c" * 40,
        "files": {
            "config.json": {"sha256": "0" * 64, "size": 10},
            "model.safetensors": {"sha256": "1" * 64, "size": 20},
        },
    }


def test_a_model_that_cannot_be_planned_breaks_its_own_recipes_only(workspace: Workspace) -> None:
    for name, text in (("broken", "{"), ("list", "[]"), ("strange", '{"model_type": "lama"}')):
        workspace.write(f"recipes/models/{name}.yaml", f"source: {{path: {name}}}\ntemplate: chatml\n")
        workspace.write(f"recipes/models/{name}/config.json", text)
        workspace.write(f"recipes/{name}.yaml", f"model: {name}\nquantization: q4f16_1\ntarget: cpu\n")
    found = planned(workspace)
    assert found.goals.keys() == {"tiny-q4f16_1-cpu", "tiny-q4f32_1-cpu"}
    broken, listed, strange = found.broken.values()
    assert broken.startswith("model broken: ")
    assert "config.json: cannot be read as JSON" in broken
    assert listed.endswith("config.json: expected a JSON object, got list")
    assert "model strange: config.json: model_type `lama` is an unknown architecture (did you mean `llama`?)" in strange


def test_no_key_holds_a_name_of_a_recipe_or_a_place(workspace: Workspace) -> None:
    for step in planned(workspace).steps.values():
        text = json.dumps(step.fields)
        assert str(workspace.root) not in text
        assert "tiny-q4f16_1-cpu" not in text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xef\xbb\xbf{}", "config.json: cannot be read as JSON: Unexpected UTF-8 BOM"),  # an editor on Windows
        (b"\xff{}", "config.json: cannot be read as JSON: 'utf-8' codec can't decode byte 0xff"),
        (b'{"a":' * 100_000, "config.json: cannot be read as JSON: "),
        (b"[]", "config.json: expected a JSON object, got list"),
    ],
)
def test_what_is_no_config(tmp_path: Path, content: bytes, problem: str) -> None:
    """Refused while planning, where the steps and transformers would refuse it."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(MlcBuildError) as error:
        read_config(tmp_path / "config.json")
    assert problem in str(error.value)
