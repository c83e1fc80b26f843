"""From a checkpoint to a package, by doing what `mlcbuild new` says comes next."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlcbuild.runtime import load
from tests.end_to_end.workspace import DODO, Workspace

STORIES = Path(__file__).parents[2] / "recipes" / "models" / "stories"

pytestmark = pytest.mark.slow


def test_what_comes_next_is_a_package(tmp_path: Path, shared_cache: Path) -> None:
    workspace = Workspace(tmp_path / "workspace", shared_cache)
    workspace.write("dodo.py", DODO)
    (workspace.root / "recipes").mkdir()
    shutil.copytree(STORIES, workspace.root / "tale")
    said = workspace.run("mlcbuild", "new", "tale").stdout.splitlines()
    write, *commands = [line.removeprefix("next").strip() for line in said if line.startswith("next")]
    path, _, text = write.removeprefix("write ").partition(": ")
    workspace.write(path, text)
    # It was trained for stories alone: judged on other text, its reference would rightly be refused.
    with (workspace.root / "recipes/models/tale.yaml").open("a") as model:
        model.write("verify: {text: ../../tale/evaluation.txt}\n")
    for command in commands:
        workspace.run(*command.partition("#")[0].split())
    package = workspace.root / "dist" / "tale-cpu"
    assert len(load(package).generate("Once upon a time", max_tokens=40).split()) > 20
    assert (
        "takes         the weights of these recipes"
        in workspace.run("mlcbuild", "inspect", "dist/tale-cpu/tale-q4f16_mixed-cpu.so").stdout
    )
