"""`changed=REV`: what a difference in version control reaches."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.changed import changed_since
from mlcbuild.recipes.files import stock
from mlcbuild.recipes.load import load
from tests.engine.workspace import Workspace

F16, F32, OTHER = "tiny-q4f16_1-cpu", "tiny-q4f32_1-cpu", "other"


@pytest.fixture
def repository(workspace: Workspace) -> Workspace:
    """A committed workspace with a second model that extends the first, and a quantization of its own."""
    workspace.write("recipes/models/base.yaml", "source: {hf: owner/name}\ntemplate: llama-2\narchitecture: mine\n")
    workspace.write("recipes/architectures/mine.yaml", "extends: between\n")
    workspace.write("recipes/architectures/between.yaml", "extends: mistral\n")
    workspace.write("recipes/models/heir.yaml", "extends: base\n")
    workspace.write("recipes/quantizations/own.yaml", "class: q0\nmodel_dtype: float32\n")
    workspace.write("recipes/other.yaml", "model: heir\nquantization: own\ntarget: cpu\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=workspace.root, check=True)
    return workspace


def changed(workspace: Workspace, revision: str = "HEAD") -> set[str]:
    return changed_since(workspace.root, load(workspace.root), revision)


def append(name: str) -> Callable[[Workspace], object]:
    def act(workspace: Workspace) -> None:
        with (workspace.root / name).open("a") as file:
            file.write("\n")

    return act


ENTRY = {"commit": "0" * 40, "config": {}, "files": {"config.json": {"sha256": "0" * 64, "size": 1}}}
CHANGES: dict[str, tuple[Callable[[Workspace], object], set[str]]] = {
    "nothing": (lambda w: None, set()),
    "a matrix": (append("recipes/matrix/tiny.yaml"), {F16, F32}),
    "a recipe": (append("recipes/other.yaml"), {OTHER}),
    "a model": (append("recipes/models/tiny.yaml"), {F16, F32}),
    "what a model extends": (append("recipes/models/base.yaml"), {OTHER}),
    "an architecture": (append("recipes/architectures/mine.yaml"), {OTHER}),
    "what an architecture extends": (append("recipes/architectures/between.yaml"), {OTHER}),
    "a file in place of one that a stock architecture extends": (
        lambda w: w.write("recipes/architectures/llama.yaml", "extends: mistral\n"),
        set(),
    ),
    "a quantization": (append("recipes/quantizations/own.yaml"), {OTHER}),
    "a checkpoint's file": (append("recipes/models/tiny/config.json"), {F16, F32}),
    "a new file of a checkpoint": (lambda w: w.write("recipes/models/tiny/vocab.txt", ""), {F16, F32}),
    "a new template in place of a stock one": (
        lambda w: w.write("recipes/templates/chatml.yaml", _stock_template()),
        {F16, F32},
    ),
    "a lock entry": (
        lambda w: w.write("recipes/recipes.lock", json.dumps({"version": 1, "repos": {"owner/name": ENTRY}})),
        {OTHER},
    ),
    "something else": (lambda w: w.write("notes.txt", "x"), set()),
}


def _stock_template() -> str:
    return (stock().recipes / "templates" / "chatml.yaml").read_text()


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_change_reaches(repository: Workspace, change: str) -> None:
    act, reached = CHANGES[change]
    act(repository)
    assert changed(repository) == reached


def test_what_was_committed_since_counts_too(repository: Workspace) -> None:
    append("recipes/other.yaml")(repository)
    commit = ["git", "-c", "user.name=x", "-c", "user.email=x", "commit", "-qam", "y"]
    subprocess.run(commit, cwd=repository.root, check=True)
    assert changed(repository) == set()
    assert changed(repository, "HEAD~1") == {OTHER}


def test_a_revision_that_git_does_not_know(repository: Workspace) -> None:
    with pytest.raises(MlcBuildError, match=r"changed=: git diff: .*no-such-branch"):
        changed(repository, "no-such-branch")
    with pytest.raises(MlcBuildError, match="expected a git revision"):
        changed(repository, "--output=x")


def test_outside_version_control(workspace: Workspace) -> None:
    with pytest.raises(MlcBuildError, match=r"changed=: git rev-parse: .*not a git repository"):
        changed(workspace)


def test_doit_builds_only_that(built: Workspace) -> None:
    for words in (
        ["init", "-q"],
        ["add", "recipes"],
        ["-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *words], cwd=built.root, check=True)
    assert built.doit("build", "changed=HEAD").splitlines()[-1].startswith("0 done, 0 up to date")
    append("recipes/matrix/tiny.yaml")(built)
    assert built.doit("build", "changed=HEAD").splitlines()[-1].startswith("0 done, 18 up to date")
