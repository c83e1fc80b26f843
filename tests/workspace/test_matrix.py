"""`mlcbuild matrix --emit github`: unique steps as jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from mlcbuild.workspace.matrix import Matrix, to_github
from tests.engine.workspace import REPOSITORY, Workspace


def emitted(workspace: Workspace) -> Mapping[str, Any]:
    command = [sys.executable, "-m", "mlcbuild.cli", "matrix", "--emit", "github"]
    path = {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=workspace.root, capture_output=True, text=True, check=True, env=path)
    assert done.stdout.count("\n") == 1  # a line, as $GITHUB_OUTPUT wants it
    found: Mapping[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_each_unique_step_is_a_job_and_all_jobs_are_the_build(workspace: Workspace) -> None:
    workspace.write("recipes/twin.yaml", "model: tiny\nquantization: q4f16_1\ntarget: cpu\n")
    stages = emitted(workspace)
    assert [len(stages[stage]["include"]) for stage in ("weights", "libraries", "packages")] == [2, 2, 3]
    for stage in ("weights", "libraries", "packages"):
        for job in stages[stage]["include"]:
            workspace.doit(*job["tasks"].split())
    ran = workspace.ran()
    assert (ran["quantize"], ran["library"], ran["package"]) == (2, 3, 2)  # the third library is the reference's
    assert "0 done" in workspace.doit("build")


def test_a_matrix_has_no_more_jobs_than_there_may_be() -> None:
    many = {f"quantize:m{number:03}": ("r",) for number in range(600)}
    found = Matrix(("r",), {"library:a": ("r",)}, many, {}, {}, {}, {})
    weights = json.loads(to_github(found))["weights"]["include"]
    assert len(weights) == 200
    assert weights[0] == {"name": "m000 and 2 more", "tasks": "quantize:m000 quantize:m001 quantize:m002"}
    assert " ".join(job["tasks"] for job in weights).split() == sorted(many)
