"""A workspace planned."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlcbuild.engine.graph import Graph
from mlcbuild.planning.planner import plan
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import Locked, Model
from tests.engine.workspace import Workspace


def no_hub(model: Model) -> Locked:
    raise AssertionError(f"{model.name}: nothing here is on a hub")


def planned(workspace: Workspace, *names: str, **changes: Any) -> Graph:
    """The plan of these recipes (none: all), with fields of the recipes changed."""
    catalog = load(workspace.root)
    recipes = [recipe for recipe in catalog.recipes.values() if not names or recipe.name in names]
    return plan(catalog, [dataclasses.replace(recipe, **changes) for recipe in recipes], no_hub)


def kinds(found: Graph) -> dict[str, int]:
    counts: dict[str, int] = {}
    for step in found.steps.values():
        counts[step.kind] = counts.get(step.kind, 0) + 1
    return counts
