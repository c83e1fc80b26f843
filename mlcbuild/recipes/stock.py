"""Where the parts that come with mlcbuild are: schemas, architectures, quantizations, targets, templates, models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlcbuild
from mlcbuild.errors import MlcBuildError


@dataclass(frozen=True)
class Stock:
    """Two folders of the installed package, or of the repository that it is imported from."""

    recipes: Path
    schema: Path


def stock() -> Stock:
    """Raises MlcBuildError when the installation is damaged."""
    package = Path(mlcbuild.__file__).resolve().parent
    # The wheel's own folder first: beside an installed package there may be a stranger's `schema` or `recipes`.
    for parent in (package / "stock", package.parent):
        found = Stock(parent / "recipes", parent / "schema")
        if (found.recipes / "architectures").is_dir() and (found.schema / "recipe.schema.json").is_file():
            return found
    raise MlcBuildError(f"{package}: the stock recipes are missing; install mlcbuild again")
