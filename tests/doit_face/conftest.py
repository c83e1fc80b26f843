"""Workspaces of toy steps, as the tests of the engine have them."""

from __future__ import annotations

from tests.engine.conftest import built, built_once, copied, shared, toys, workspace

__all__ = ["built", "built_once", "copied", "shared", "toys", "workspace"]
