"""Versions of the tools that a step declares."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

from mlcbuild.errors import MlcBuildError


def toolchain(distributions: Iterable[str]) -> dict[str, str]:
    """The installed version of each distribution, by name. Raises MlcBuildError for one that is not installed."""
    return {name: _version(name) for name in sorted(distributions)}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise MlcBuildError(f"{name} is not installed: pip install {name}") from None
