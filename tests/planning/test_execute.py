"""The step that runs a GPU library's kernels: when there is one, and who shares it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlcbuild.compiler import targets
from mlcbuild.engine.graph import Graph, Step
from mlcbuild.planning.planner import plan
from mlcbuild.recipes.load import load
from tests.engine.workspace import CONFIG, Workspace, make_workspace
from tests.planning.planned import no_hub


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """On a machine with every tool, on x86-64 Linux, without a GPU."""
    monkeypatch.setattr("mlcbuild.compiler.tools.missing", lambda target: None)
    monkeypatch.setattr("mlcbuild.compiler.targets.real_device", lambda target: None)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    workspace = make_workspace(tmp_path)
    for name, changes in {"deep": {"num_hidden_layers": 9, "vocab_size": 300}, "wide": {"hidden_size": 96}}.items():
        workspace.write(f"recipes/models/{name}.yaml", f"source: {{path: {name}}}\ntemplate: chatml\n")
        workspace.write(f"recipes/models/{name}/config.json", json.dumps({**CONFIG, **changes}))
    for model in ("tiny", "deep", "wide"):
        workspace.write(f"recipes/{model}-cuda.yaml", f"model: {model}\nquantization: q4f16_1\ntarget: cuda\n")
    return workspace


def planned(workspace: Workspace, *names: str) -> Graph:
    catalog = load(workspace.root)
    return plan(catalog, [catalog.recipes[name] for name in names], no_hub)


def executions(graph: Graph) -> list[Step]:
    return [step for step in graph.steps.values() if step.kind == "execute"]


def test_models_of_one_width_share_the_step_however_deep(workspace: Workspace) -> None:
    found = planned(workspace, "tiny-cuda", "deep-cuda", "wide-cuda")
    names = {name: goal.steps["execute"] for name, goal in found.goals.items()}
    assert len(executions(found)) == 2
    assert names["tiny-cuda"] == names["deep-cuda"] != names["wide-cuda"]
    assert names["tiny-cuda"].startswith("execute:llama-") and names["tiny-cuda"].endswith("-q4f16_1-cuda")
    structure = found.steps[names["deep-cuda"]].fields["structure"]
    assert (structure["num_hidden_layers"], structure["max_batch_size"]) == (2, 2)
    assert names["deep-cuda"] in found.steps[found.goals["deep-cuda"].steps["verify"]].producers


def test_a_gpu_of_this_machine_takes_the_emulated_ones_place(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (emulated,) = executions(planned(workspace, "tiny-cuda"))
    assert [item.name for item in emulated.inputs] == ["cpu_library", "lower"]
    monkeypatch.setattr("mlcbuild.compiler.targets.real_device", lambda target: "NVIDIA H100")
    found = planned(workspace, "tiny-cuda")
    (real,) = executions(found)
    verify = found.steps[found.goals["tiny-cuda"].steps["verify"]]
    assert "cpu_library" not in {item.name for item in verify.inputs}  # the package's own library runs there
    assert [item.name for item in real.inputs] == ["cpu_library", "library"]
    assert real.fields["device"] == "NVIDIA H100"


def test_a_gpu_beside_another_processor_runs_no_library(monkeypatch: pytest.MonkeyPatch, workspace: Workspace) -> None:
    """As a GH200's: the library's host code is x86-64."""
    cuda = load(workspace.root).targets["cuda"]
    monkeypatch.undo()
    monkeypatch.setattr("pathlib.Path.exists", lambda path: True)
    monkeypatch.setattr("pathlib.Path.glob", lambda folder, pattern: [folder / "information"])
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: "Model: \t\t NVIDIA GH200\n")
    for machine, found in (("x86_64", "NVIDIA GH200"), ("aarch64", None)):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert targets.real_device(cuda) == found


def test_where_nothing_runs_it_the_build_goes_on_and_says_why(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.write("recipes/metal.yaml", "model: tiny\nquantization: q4f16_1\ntarget: metal\n")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    found = planned(workspace, "tiny-cuda", "metal")
    assert not executions(found)
    reasons = [found.steps[goal.steps["verify"]].fields["not_executed"] for goal in found.goals.values()]
    assert reasons == [
        "the emulated device runs on x86-64 Linux, not on aarch64 Linux",
        "the emulated device runs whole libraries of kind cuda, and none of kind metal",
    ]
