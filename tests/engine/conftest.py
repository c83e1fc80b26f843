from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.engine.workspace import REPOSITORY, Workspace, make_workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path)


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = make_workspace(tmp_path_factory.mktemp("built"))
    workspace.doit("-n", "2")
    workspace.ran()
    return workspace


@pytest.fixture
def shared(built_once: Workspace) -> Workspace:
    """The same for all tests that leave everything built; nothing counts as having run."""
    built_once.ran()
    return built_once


@pytest.fixture
def copied(built_once: Workspace, tmp_path: Path) -> Workspace:
    """Everything is built and installed, but the checkpoint's files are others than those that were looked at."""
    shutil.copytree(built_once.root.parent, tmp_path, dirs_exist_ok=True)
    workspace = Workspace(tmp_path / "workspace", tmp_path / "tricks")
    workspace.ran()
    return workspace


@pytest.fixture
def built(copied: Workspace) -> Workspace:
    """A workspace in which everything is built and installed; nothing counts as having run."""
    copied.doit()  # the checkpoint's files are others now: their places are recorded, and no more
    assert copied.ran() == {}
    return copied


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy steps importable here and in step processes; returns the folder of tricks."""
    tricks = tmp_path / "tricks"
    tricks.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("TOY_TRICKS", str(tricks))
    monkeypatch.syspath_prepend(str(REPOSITORY))
    return tricks
