"""Hub models without an entry in recipes.lock, and recipes that only a selection builds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlcbuild.cli.main import main
from mlcbuild.doit_face.argv import OF_LIBRARIES, OF_MODELS, OF_RECIPES, named_tasks, only_lists
from mlcbuild.doit_face.groups import GROUPS
from mlcbuild.recipes.lockfile import read_lock
from mlcbuild.recipes.select import Selection
from tests.checkpoints.hub_server import COMMIT, Fault, Hub, serving
from tests.engine.workspace import CONFIG, Workspace


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub({"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"w" * 1500})) as made:
        for name, value in {
            "ENDPOINT": made.url,
            "HOME": str(tmp_path / "hf"),
            "TOKEN": "",
            "HUB_OFFLINE": "0",
        }.items():
            monkeypatch.setenv(f"HF_{name}", value)
        yield made


@pytest.fixture
def remote(copied: Workspace) -> Workspace:
    """Beside `tiny`, which is here and built, the recipe `far` of a model that is on the hub."""
    copied.write("recipes/models/far.yaml", "source: {hf: owner/name}\ntemplate: chatml\n")
    copied.write("recipes/far.yaml", "model: far\nquantization: q4f16_1\ntarget: cpu\n")
    return copied


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", Selection(runs=True)),
        ("build recipe=a", Selection(runs=True)),
        ("-n 2 --continue run build", Selection(runs=True)),
        ("build:a 'build:b-*' verify:c", Selection(runs=True, whole=False, recipes=("a", "b-*", "c"))),
        ("quantize:m-q4f16_1", Selection(runs=True, whole=False, models=("m-q4f16_1",))),
        (
            "allocate:m-q5f16_auto measure:m-q4f16_1-cpu",
            Selection(runs=True, whole=False, models=("m-q5f16_auto", "m-q4f16_1-cpu")),
        ),
        ("library:llama-*", Selection(runs=True, whole=False, others=True)),
        ("list --all", Selection(whole=False)),
        ("info build:a", Selection(whole=False)),
        ("forget build", Selection(whole=False)),
    ],
)
def test_what_a_command_line_is_about(line: str, expected: Selection) -> None:
    import shlex

    found = named_tasks(shlex.split(line))
    assert set(found.recipes) == set(expected.recipes)
    assert found.__dict__ | {"recipes": ()} == expected.__dict__ | {"recipes": ()}


def test_every_kind_of_task_is_named_for_something() -> None:
    assert sorted([*OF_RECIPES, *OF_MODELS, *OF_LIBRARIES]) == sorted(GROUPS)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("list", True),
        ("list -q --all --sort definition", True),
        ("list -qs", False),
        ("list --status", False),
        ("list --stat --all", False),
        ("info build:a", False),
        ("build", False),
    ],
)
def test_which_command_lines_ask_for_names_only(line: str, expected: bool) -> None:
    assert only_lists(line.split()) == expected


def test_listing_and_planning_ask_no_hub(remote: Workspace, hub: Hub) -> None:
    listed = remote.doit("list", "--all")
    assert "build:far" in listed and "(recipes/far.yaml; unknown until locked)" in listed
    assert "hf:owner/name is not in recipes.lock" in remote.doit("info", "build:far", status=None)
    remote.doit("clean")
    assert hub.requests == [] and read_lock(remote.root) == {}


def test_a_plan_and_the_matrix_say_what_is_unknown(
    remote: Workspace, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(remote.root)
    remote.write("recipes/models/twin.yaml", "extends: tiny\ntemplate: llama-2\n")
    remote.write("recipes/twin.yaml", "model: twin\nquantization: q4f16_1\ntarget: cpu\nmanual: true\n")

    def said(*words: str) -> str:
        assert main([*words]) == 0
        return capsys.readouterr().out

    note = "hf:owner/name is not in recipes.lock: `mlcbuild lock far` asks the hub"
    assert f"??       1 recipe unknown until locked, in no figure above:\n         far: {note}\n" in said("plan")
    assert f"??    far: unknown until locked: {note}" in said("why", "far")
    first, *_, label = (text := said("matrix")).splitlines()[0:4]
    assert first == "2 libraries and 2 sets of weights for 3 recipes; 1 recipe of 1 model unknown until locked"
    assert label.strip().endswith("-q4f16_1-cpu  2 recipes: tiny-q4f16_1-cpu twin")
    assert text.endswith(f"unknown until locked\n  far  1 recipe: {note}\n")
    assert said("matrix", "model=far").startswith("0 libraries and 0 sets of weights for 0 recipes; 1 recipe of 1 mod")
    found = json.loads(said("matrix", "--json"))
    assert sorted(map(len, found["libraries"].values())) == [1, 2] and found["unlocked"] == {"far": ["far"]}
    assert main(["pin", "far"]) == 1
    assert "far is not built, so there is nothing to pin: doit build recipe=far" in capsys.readouterr().err
    assert hub.requests == []
    remote.doit("download:far")
    assert said("matrix").startswith("2 libraries and 3 sets of weights for 4 recipes\n")


def test_a_build_of_others_asks_no_hub(remote: Workspace, hub: Hub) -> None:
    remote.doit("build:tiny-*")
    remote.doit("build", "model=tiny")
    remote.doit("quantize:tiny-q4f16_1")
    assert hub.requests == []


@pytest.mark.parametrize("arguments", [("build", "recipe=far"), ("build:far",), ("download:far",), ("build",)])
@pytest.mark.slow
def test_a_build_looks_up_what_it_is_about_once(remote: Workspace, hub: Hub, arguments: tuple[str, ...]) -> None:
    status = 1 if arguments == ("build",) else 3  # one of many recipes, or what was asked for by its name
    assert "locked=1 forbids to add it: `mlcbuild lock far` does" in remote.doit(*arguments, "locked=1", status=status)
    assert hub.requests == []
    assert f"far: locked at commit {COMMIT}" in remote.doit(*arguments)
    assert read_lock(remote.root)["owner/name"].commit == COMMIT
    hub.requests.clear()
    remote.doit(*arguments, "locked=1")
    assert hub.requests == []


def test_a_model_that_the_hub_refuses_breaks_only_its_recipes(remote: Workspace, hub: Hub) -> None:
    shutil.rmtree(remote.dist)
    hub.faults = [Fault("owner/name", 403, {"X-Error-Code": "GatedRepo"}, times=9)]
    refused = remote.doit("--no-continue", "build", status=3)
    assert "ERROR: model far: hf:owner/name: " in refused and not remote.dist.exists()
    built = remote.doit("build", status=1)
    assert "model far: hf:owner/name: " in built and "Traceback" not in built
    assert {path.name for path in remote.dist.iterdir()} == {"tiny-q4f16_1-cpu", "tiny-q4f32_1-cpu"}


@pytest.mark.slow
def test_a_manual_recipe_is_built_when_it_is_asked_for(remote: Workspace, hub: Hub) -> None:
    matrix = "matrix: {model: [far], quantization: [q4f32_1], target: [cpu]}\nmanual: true\n"
    remote.write("recipes/matrix/far.yaml", matrix)
    remote.write("recipes/far.yaml", "model: far\nquantization: q4f16_1\ntarget: cpu\nmanual: true\n")
    for _ in range(2):  # the second time from memory
        assert "far" not in remote.doit("build")
    assert hub.requests == []
    listed = remote.doit("list", "--all")
    assert "build:far " in listed and "build:far-q4f32_1-cpu" in listed
    remote.doit("build:far")
    assert (remote.dist / "far").is_dir() and not (remote.dist / "far-q4f32_1-cpu").exists()
    remote.doit("build", "model=f*")
    assert (remote.dist / "far-q4f32_1-cpu").is_dir()
    assert "far" not in remote.doit("build")
    assert "0 done, 30 up to date" in remote.doit("build", "recipe=*").replace("\n", " ")
