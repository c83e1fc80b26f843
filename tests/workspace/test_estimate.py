"""`mlcbuild plan`: what would run, what it would take, what is shared, and a disk that is too small for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.cache.files import tree_of_folder
from mlcbuild.cache.tree import Tree
from mlcbuild.cli.main import main
from mlcbuild.errors import MlcBuildError
from mlcbuild.planning import planner as graph
from mlcbuild.workspace.estimate import BuildEstimate, check_room, estimate
from mlcbuild.workspace.estimate_text import render
from mlcbuild.workspace.session import Session, open_session
from tests.engine.workspace import Workspace

F16, F32 = "tiny-q4f16_1-cpu", "tiny-q4f32_1-cpu"


@pytest.fixture(autouse=True)
def toy_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "STEPS", "tests.engine.toysteps")


def opened(workspace: Workspace) -> Session:
    return open_session(workspace.root, lambda event: None)


MODELS = ("download", "convert", "quantize")


def plan(workspace: Workspace) -> BuildEstimate:
    return estimate(opened(workspace))


def test_before_the_first_build_everything_is_to_run_and_nothing_is_known_of_times(workspace: Workspace) -> None:
    found = plan(workspace)
    assert len(found.to_run) == len(found.steps) == 16
    assert list(found.to_install) == list(found.recipes) == [F16, F32]
    assert (found.libraries, found.weights, found.unknown, found.seconds) == (2, 2, 16, 0)
    checkpoint = sum(path.stat().st_size for path in (workspace.root / "recipes/models/tiny").iterdir())
    by_name = {step.name: step for step in found.steps}
    assert by_name["download:tiny"].size == checkpoint
    assert by_name["download:tiny"].new == 0, "a local checkpoint is borrowed where it lies"
    assert by_name["quantize:tiny-q4f16_1"].size == round(checkpoint * 5 / 16), "judged by the bits of a weight"
    assert not workspace.dist.exists() and not workspace.ran()
    (row,) = [line.split() for line in render(found).splitlines() if line.startswith("verify ")]
    assert row == ["verify", "2", "0", "2", "unknown", "unknown"], "fault C: not 0 B and 0.0 s, as it said"


def test_a_budget_takes_what_it_has_or_the_largest_of_its_formats(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "STEPS", "mlcbuild.steps")  # there is no toy that allocates
    for bits in (5, 30):
        text = f"class: q4\nmodel_dtype: float16\nbits_per_weight: {bits}\nformats: [q4f16_1, q8f16_1]\n"
        workspace.write(f"recipes/quantizations/q{bits}.yaml", text)
        workspace.write(f"recipes/q{bits}.yaml", f"model: tiny\nquantization: q{bits}\ntarget: cpu\n")
    checkpoint = sum(path.stat().st_size for path in (workspace.root / "recipes/models/tiny").iterdir())
    sizes = {step.name: step.size for step in plan(workspace).steps}
    assert sizes["quantize:tiny-q5"] == round(checkpoint * 5 / 16)
    assert sizes["quantize:tiny-q30"] == round(checkpoint * 9 / 16)


def test_what_many_recipes_need_is_looked_at_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS.md E: a checkpoint that was not built yet was hashed anew for every step that needs it, 72 times of 20."""
    looked = list[Path]()

    def counted(folder: Path, *arguments: Any, **named: Any) -> Tree:
        looked.append(folder)
        return tree_of_folder(folder, *arguments, **named)

    monkeypatch.setattr("mlcbuild.engine.lookup.tree_of_folder", counted)
    few = len(plan(workspace).recipes), len(looked)
    formats = "[q4f16_1, q4f32_1, q3f16_1, q8f16_1, q0f16, q0f32]"
    workspace.write(
        "recipes/matrix/tiny.yaml", f"matrix: {{model: [tiny], quantization: {formats}, target: [cpu, cpu-x86_64]}}\n"
    )
    looked.clear()
    assert (few, (len(plan(workspace).recipes), len(looked))) == ((2, 1), (12, 1))


def test_after_a_build_nothing_is_to_run(built: Workspace) -> None:
    found = plan(built)
    assert (found.to_run, list(found.to_install), found.new) == ([], [], 0)
    assert "16 steps, each once: 16 cached, 0 to run" in render(found)


def test_estimates_are_those_of_the_most_similar_past_step(built: Workspace) -> None:
    config = json.loads((built.root / "recipes/models/tiny/config.json").read_text())
    built.write("recipes/models/big.yaml", "source: {path: big}\ntemplate: chatml\n")
    built.write("recipes/models/big/config.json", json.dumps(config))
    built.write("recipes/models/big/tokenizer.json", "{}")
    built.write("recipes/models/big/model.safetensors", "these would be weights" * 10_000)
    built.write("recipes/big.yaml", "model: big\nquantization: q4f16_1\ntarget: cpu\n")
    past = {step.name: step for step in plan(built).steps if step.cached}
    coming = {step.name: step for step in plan(built).to_run}
    assert {name.partition(":")[0] for name in coming} == {*MODELS, "package", "measure", "verify"}
    step, like = coming["quantize:big-q4f16_1"], past["quantize:tiny-q4f16_1"]
    assert step.size is not None and like.size and step.seconds is not None and like.seconds is not None
    factor = step.size / like.size
    assert 5 < factor < 11, "ten times the weights go in"
    assert step.seconds == pytest.approx(like.seconds * factor, rel=0.01)
    assert coming["package:big"].new == 0 or coming["package:big"].new < coming["package:big"].size  # type: ignore[operator]


def test_shared_libraries_are_counted_once(built: Workspace) -> None:
    built.write("recipes/models/twin.yaml", "extends: tiny\ntemplate: llama-2\n")
    built.write("recipes/twin.yaml", "model: twin\nquantization: q4f16_1\ntarget: cpu\n")
    assert "2 libraries and 2 sets of weights for 3 recipes" in render(plan(built))


def test_a_disk_that_is_too_small_is_said_before_anything_runs(workspace: Workspace) -> None:
    found = plan(workspace)
    small = dataclasses.replace(found, new=40_000_000_000, free=12_000_000)
    text = (
        r"/c: the 16 steps to run are estimated to need 40.0 GB, and 12.0 MB are free: nothing was started. "
        r"Free some space, put the cache elsewhere \(cache=DIR\), or build fewer recipes at a time"
    )
    with pytest.raises(MlcBuildError, match=text):
        check_room(small, Path("/c"))
    assert "40.0 GB estimated, 12.0 MB free: NOT ENOUGH" in render(small)


def test_a_build_asks_for_room_first(workspace: Workspace) -> None:
    dodo = workspace.root / "dodo.py"
    small = "\nimport shutil\nfrom collections import namedtuple\n"
    small += "shutil.disk_usage = lambda path: namedtuple('U', 'total used free')(100, 99, 1)\n"
    dodo.write_text(dodo.read_text() + small)
    output = workspace.doit(status=3)
    assert "ERROR: " in output and "are estimated to need " in output and "1 B are free: nothing was started" in output
    assert "Traceback" not in output
    assert workspace.ran() == {}


@pytest.mark.parametrize(
    ("words", "recipes"),
    [
        ([F16], 1),
        ([F16, F32], 2),
        (["*f16*,*f32*"], 2),
        (["quantization=q4f32_1"], 1),
        (["--quantization", "q4f*", "--target", "cpu"], 2),
        (["*f16*", "model=tiny"], 1),
    ],
)
def test_selection(
    built: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    recipes: int,
) -> None:
    monkeypatch.chdir(built.root)
    assert main(["plan", *words]) == 0
    assert f"recipes  {recipes} recipe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["tiny-q4f16_1-cpi"], "no recipe is named `tiny-q4f16_1-cpi`; did you mean `tiny-q4f16_1-cpu`?"),
        (["model=tinny"], "no recipe has the model `tinny`; did you mean `tiny`?"),
        (["--target", "cuda*"], "no recipe has a target that matches `cuda*`; there are cpu"),
        (["quantisation=q4f16_1"], "unknown variable quantisation=: did you mean quantization=?"),
        ([F16, "quantization=q4f32_1"], f"no recipe is all of recipe={F16} quantization=q4f32_1"),
        (["strict=1"], "strict= is for building"),
        (["target="], "target=: a name is missing"),
    ],
)
def test_mistakes_get_a_suggestion(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(workspace.root)
    assert main(["plan", *words]) == 1
    assert text in capsys.readouterr().err


def test_doit_takes_the_same_selection(built: Workspace) -> None:
    assert "build:tiny-q4f16_1-cpu" not in built.doit("build", "quantization=q4f32_1", "model=t*")
    output = built.doit("build", "target=cpi", status=3)
    assert "no recipe has the target `cpi`; did you mean `cpu`?" in output
