"""The outline of a plan, which `doit list` shows, has the plan's names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.engine.graph import Graph, Input
from mlcbuild.planning import planner, shapes
from mlcbuild.planning.adding import Steps
from mlcbuild.planning.outline import outline
from mlcbuild.planning.planner import plan
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import Catalog, Model
from tests.engine.workspace import CONFIG, make_workspace

BY_LAYER = "verify: {memory: 0.000001}\n"


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Recipes that share steps, that would have one name for two, and that cannot be planned."""
    workspace = make_workspace(tmp_path)
    workspace.write("recipes/models/twin.yaml", "extends: tiny\ntemplate: llama-2\n")  # weights as those of `tiny`
    workspace.write("recipes/models/far.yaml", "source: {hf: owner/name}\ntemplate: chatml\n")
    workspace.write("recipes/models/broken.yaml", "source: {path: broken}\ntemplate: chatml\n")
    workspace.write("recipes/models/broken/config.json", "{")
    for name, more in {
        "again": "",  # a cell of the matrix, by another name
        "shorter": "overrides: {context_window_size: 64}\n",
        "stated": f"overrides: {{context_window_size: {CONFIG['max_position_embeddings']}}}\n",
        "other": "template: llama-2\n",
        "strict": "verify: {kl: 1}\n",
        "strict-too": "verify: {kl: 1.0}\n",
        "layers": BY_LAYER,
        "layers-shorter": f"overrides: {{context_window_size: 64}}\n{BY_LAYER}",
        "text": "verify: {text: models/tiny/text.txt}\n",
    }.items():
        workspace.write(f"recipes/{name}.yaml", f"model: tiny\nquantization: q4f16_1\ntarget: cpu\n{more}")
    workspace.write("recipes/models/tiny/text.txt", "Once upon a time")
    for name, quantization, target in (
        ("twin", "q4f16_1", "cpu"),
        ("twin", "q4f16_1-gptq", "cpu-exact"),
        ("tiny", "q4f16_1-calibrated", "vulkan"),
        ("tiny", "q5f16_auto", "cpu"),
        ("twin", "q5f16_auto", "cpu"),
        ("tiny", "q4f16_1", "vulkan"),
        ("tiny", "q4f16_1", "opencl"),
        ("tiny", "q4f16_1", "webgpu"),
        ("tiny", "q5f16_auto", "opencl"),
        ("twin", "q5f16_auto", "iphone"),
        ("far", "q4f16_1", "cpu"),
        ("broken", "q4f16_1", "cpu"),
    ):
        text = f"model: {name}\nquantization: {quantization}\ntarget: {target}\n"
        workspace.write(f"recipes/{name}-{quantization}-on-{target}.yaml", text)
    return load(workspace.root)


def nothing_is_locked(model: Model) -> None:
    return None


def names(graph: Graph) -> list[object]:
    steps = [(name, step.kind) for name, step in graph.steps.items()]
    goals = [(name, goal.recipe, list(goal.steps.items())) for name, goal in graph.goals.items()]
    return [steps, goals, graph.unavailable, graph.unlocked, graph.broken]


def test_an_outline_has_the_names_of_the_plan(catalog: Catalog) -> None:
    whole = plan(catalog, catalog.recipes.values(), nothing_is_locked)
    assert whole.unlocked and whole.broken
    assert sum(bool(re.search("^measure:.*-[0-9a-f]{8}$", name)) for name in whole.steps) > 1  # two of one name
    assert names(outline(catalog, catalog.recipes.values(), nothing_is_locked)) == names(whole)
    backwards = [*catalog.recipes.values()][::-1]  # whoever comes first names what is shared
    whole = plan(catalog, backwards, nothing_is_locked)
    assert names(outline(catalog, backwards, nothing_is_locked)) == names(whole)


def test_equal_numbers_of_other_types_are_other_steps() -> None:
    """They are other values in the key of an action, which does not depend on the recipes beside it."""
    steps = Steps(planner.STEPS)
    package = (Input("package", step="package:m"),)
    given = [steps.add("verify", "m", {"kl": kl, "notes": ["a"]}, package) for kl in (1, 1.0, True, 1.0)]
    assert given[0] == "verify:m" and given[1] == given[3] and len(set(given)) == 3
    assert [type(steps.added[name].fields["kl"]) for name in given[:3]] == [int, float, bool]


def test_what_many_models_share_is_worked_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also why it cannot be: 20 recipes of a broken model do not read its config.json 20 times."""
    workspace = make_workspace(tmp_path)
    for name in ("fine", "tuned", "broken"):
        workspace.write(f"recipes/models/{name}.yaml", f"source: {{path: {name}}}\ntemplate: chatml\n")
        workspace.write(f"recipes/models/{name}/config.json", "[]" if name == "broken" else json.dumps(CONFIG))
    axes = "{model: [fine, tuned, broken], quantization: [q4f16_1, q4f32_1, q0f16], target: [cpu, cpu-exact]}"
    workspace.write("recipes/matrix/many.yaml", f"matrix: {axes}\n")
    catalog, read, resolved = load(workspace.root), list[Path](), list[str]()
    recipes = [recipe for recipe in catalog.recipes.values() if recipe.model.name != "tiny"]

    def reading(path: Path) -> dict[str, Any]:
        read.append(path)
        return config_of(path)

    def resolving(*of: Any) -> shapes.Shape:
        resolved.append(of[1].name)
        return shape_of(*of)

    config_of, shape_of = shapes.read_config, shapes.shape_of
    monkeypatch.setattr(shapes, "read_config", reading)
    monkeypatch.setattr(planner, "shape_of", resolving)
    found = plan(catalog, recipes, nothing_is_locked)
    assert sorted(path.parent.name for path in read) == ["broken", "fine", "tuned"]
    assert len(resolved) == 1  # their config.json says the same
    assert len(found.goals) == 12 and len(found.broken) == 6
    assert set(found.broken.values()) == {
        f"model broken: {workspace.root}/recipes/models/broken/config.json: expected a JSON object, got list"
    }
