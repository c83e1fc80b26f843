"""Architecture files as the tests use them: read without a workspace around them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

from mlcbuild.recipes import convert
from mlcbuild.recipes.architectures import laid_over
from mlcbuild.recipes.types import Architecture

STOCK = Path(__file__).parents[2] / "recipes" / "architectures"


def known(folder: Path = STOCK) -> dict[str, Architecture]:
    """Every architecture of a folder."""
    return {path.stem: architecture(path.stem, folder) for path in sorted(folder.glob("*.yaml"))}


@functools.cache
def architecture(name: str, folder: Path = STOCK) -> Architecture:
    return convert.architecture(name, _whole(name, folder))


@functools.cache
def _whole(name: str, folder: Path) -> dict[str, Any]:
    own = yaml.load((folder / f"{name}.yaml").read_text(), yaml.CSafeLoader)
    return laid_over(_whole(own["extends"], folder) if "extends" in own else {}, own)
