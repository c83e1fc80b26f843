"""The wheel carries everything: a workspace far from the repository builds the shipped model with it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mlcbuild
from tests.end_to_end.workspace import Workspace

pytestmark = pytest.mark.slow

PROJECT = Path(mlcbuild.__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(PROJECT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_type_checkers_are_told_that_the_package_has_types(installed: Path) -> None:
    assert (installed / "mlcbuild" / "py.typed").exists()


def test_a_new_workspace_builds_the_shipped_model(installed: Path, tmp_path: Path, shared_cache: Path) -> None:
    environment = {"PYTHONPATH": str(installed)}
    here = Workspace(tmp_path, shared_cache)
    here.run("mlcbuild", "init", "mine", environment=environment)
    workspace = Workspace(tmp_path / "mine", shared_cache)
    assert "1 recipe" in workspace.run("mlcbuild", "check", environment=environment).stdout
    workspace.doit("build", environment=environment)
    text = workspace.run(
        "mlcbuild", "generate", "dist/stories-cpu", "--chat", "--prompt", "What color is the sky?",
        environment=environment,
    ).stdout  # fmt: skip
    assert text == "The sky is blue.\n"
    again = here.run("mlcbuild", "init", "mine", check=False, environment=environment)
    assert again.returncode == 1
    assert "already there; nothing was written, choose another folder" in again.stderr


def test_a_file_of_the_workspace_shadows_the_stock_one(installed: Path, tmp_path: Path, shared_cache: Path) -> None:
    environment = {"PYTHONPATH": str(installed)}
    Workspace(tmp_path, shared_cache).run("mlcbuild", "init", "mine", environment=environment)
    workspace = Workspace(tmp_path / "mine", shared_cache)
    stock = installed / "mlcbuild" / "stock" / "recipes" / "templates" / "chatml.yaml"
    workspace.write("recipes/templates/chatml.yaml", stock.read_text())
    report = workspace.run("mlcbuild", "check", environment=environment).stdout
    assert "recipes/templates/chatml.yaml: warning:" in report
