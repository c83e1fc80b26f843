"""What all tests of a run share."""

from __future__ import annotations

import os

import pytest

from tests.support import zig_cache


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every C kernel once in a run, whichever worker or process of a test needs it first."""
    run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        run = run.parent  # the workers' common folder
    os.environ[zig_cache.PLACE] = str(run / "zig")
