"""examples/: what is shown there works as it stands."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlcbuild.recipes.load import check, render
from tests.docs.pages import ROOT
from tests.end_to_end.workspace import Workspace

EXAMPLES = ROOT / "examples"


def test_the_workspace_has_no_problems() -> None:
    report = check(EXAMPLES / "own-recipe")
    assert report.ok and not report.warnings, render(report)


@pytest.mark.slow
def test_the_workspace_builds_and_the_program_runs_the_package(tmp_path: Path, shared_cache: Path) -> None:
    shutil.copytree(EXAMPLES / "own-recipe", tmp_path / "own-recipe", ignore=shutil.ignore_patterns("cache", "dist"))
    workspace = Workspace(tmp_path / "own-recipe", shared_cache)
    workspace.doit("build")
    assert [path.name for path in (workspace.root / "dist").iterdir()] == ["short-stories-cpu"]
    command = [sys.executable, str(EXAMPLES / "chat.py"), "dist/short-stories-cpu", "What color is the sky?"]
    done = subprocess.run(command, cwd=workspace.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "The sky is blue."
    assert lines[-3].endswith("' time'")
