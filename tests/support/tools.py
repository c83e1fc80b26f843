"""Tests that need a system tool: skipped where it is missing, failed where MLCBUILD_TEST_TOOLS=required (CI)."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """End the test because this machine lacks `what`."""
    if os.environ.get("MLCBUILD_TEST_TOOLS") == "required":
        pytest.fail(f"this machine lacks {what}, and MLCBUILD_TEST_TOOLS=required forbids to skip the test")
    pytest.skip(f"needs {what}")
