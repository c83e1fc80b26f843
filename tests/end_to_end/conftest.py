"""One tiny checkpoint for all end-to-end tests that do not need their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.workspace import Workspace, make_workspace, write_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_checkpoint(folder)
    return folder


@pytest.fixture
def workspace(tmp_path: Path, shared_cache: Path, tiny_checkpoint: Path) -> Workspace:
    return make_workspace(tmp_path / "workspace", shared_cache, tiny_checkpoint)
