"""CONTRIBUTING.md's worked examples: each patch is applied to a copy of mlcbuild, and the copy builds with it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks
from tests.end_to_end.workspace import Workspace

PATCHES = [block.text for block in blocks((ROOT / "CONTRIBUTING.md").read_text()) if block.language == "diff"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package with its recipes and schemas, as in the repository."""
    for name in ("mlcbuild", "recipes", "schema"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


def apply(patch: str, copy: Path) -> list[str]:
    """Apply a patch; the files that it touches."""
    command = ["git", "apply", "-p1", "-C1", "-"]
    done = subprocess.run(command, cwd=copy, input=patch, capture_output=True, text=True)
    assert done.returncode == 0, f"a patch of CONTRIBUTING.md does not apply any more: {done.stderr}"
    return [line.removeprefix("+++ b/") for line in patch.splitlines() if line.startswith("+++ ")]


@pytest.mark.slow
def test_a_kind_of_step_is_a_file_and_a_place_in_the_planner(copy: Path, tmp_path: Path, shared_cache: Path) -> None:
    (patch,) = [patch for patch in PATCHES if "mlcbuild/steps/sums.py" in patch]
    assert apply(patch, copy) == [
        "mlcbuild/steps/sums.py",
        "mlcbuild/planning/planner.py",
        "mlcbuild/planning/backends.py",
    ]
    environment = {"PYTHONPATH": str(copy)}
    Workspace(tmp_path, shared_cache).run("mlcbuild", "init", "mine", environment=environment)
    workspace = Workspace(tmp_path / "mine", shared_cache)
    built = workspace.doit("build", environment=environment).stdout
    assert "ok sums:stories-cpu" in built or "-- sums:stories-cpu" in built
    assert "hit   sums:stories-cpu" in workspace.run("mlcbuild", "why", "stories-cpu", environment=environment).stdout
    # The sums of the package, from the cache that the step put them into, fit what was installed.
    sums = [path.read_text() for path in (shared_cache / "cas").rglob("*") if _is_sums(path)]
    assert len(sums) == 1
    checked = subprocess.run(
        ["sha256sum", "--check", "--quiet"], input=sums[0], text=True, cwd=workspace.root / "dist" / "stories-cpu"
    )
    assert checked.returncode == 0


@pytest.mark.slow
def test_a_backend_is_a_folder_a_line_and_a_target(copy: Path, tmp_path: Path, shared_cache: Path) -> None:
    (patch,) = [patch for patch in PATCHES if "mlcbuild/compiler/opencl" in patch]
    touched = apply(patch, copy)
    assert [name for name in touched if not name.startswith("mlcbuild/compiler/opencl/")] == [
        "recipes/targets/opencl-small.yaml",
        "mlcbuild/planning/backends.py",
    ]
    environment = {"PYTHONPATH": str(copy)}
    Workspace(tmp_path, shared_cache).run("mlcbuild", "init", "mine", environment=environment)
    workspace = Workspace(tmp_path / "mine", shared_cache)
    workspace.write("recipes/small.yaml", "model: stories\nquantization: q4f16_1\ntarget: opencl-small\n")
    workspace.doit("library", "recipe=small", environment=environment)
    assert _lowered(workspace, environment) == "hit"
    # Without the line the device has the backend of all GPUs, whose code is another.
    table = copy / "mlcbuild" / "planning" / "backends.py"
    lines = [line for line in table.read_text().splitlines(keepends=True) if not line.startswith('    "opencl"')]
    table.write_text("".join(lines))
    assert _lowered(workspace, environment) == "miss"


def _lowered(workspace: Workspace, environment: dict[str, str]) -> str:
    """Whether the recipe's module is in the cache."""
    said = workspace.run("mlcbuild", "why", "small", environment=environment).stdout
    answers = [line.split() for line in said.splitlines() if line.startswith(("hit", "miss"))]
    (answer,) = [answer for answer, task in answers if task.startswith("lower:") and task.endswith("-opencl-small")]
    return answer


def _is_sums(path: Path) -> bool:
    try:
        content = path.read_bytes() if path.stat().st_size < 10_000 else b""
    except OSError:  # a folder, or a file that another worker's build has just renamed
        return False
    first = content.splitlines()[:1]
    return bool(first) and len(first[0]) > 66 and first[0][64:66] == b"  " and b"mlc-chat-config.json" in content
