"""What recipes want of a planner, and why some of them get nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mlcbuild.engine.graph import Goal, Graph
from mlcbuild.errors import MlcBuildError, NotLocked, Unavailable
from mlcbuild.recipes.types import Recipe

if TYPE_CHECKING:
    from mlcbuild.planning.planner import Planner


def goals_of(planner: Planner, recipes: Iterable[Recipe]) -> Graph:
    """The graph of what the planner makes of the recipes."""
    goals: dict[str, Goal] = {}
    unavailable: dict[str, str] = {}
    unlocked: dict[str, str] = {}
    broken: dict[str, str] = {}
    for recipe in recipes:
        try:
            goals[recipe.name] = planner.goal(recipe)
        except Unavailable as error:
            unavailable[recipe.name] = str(error)
        except NotLocked as error:
            unlocked[recipe.name] = str(error)
        except MlcBuildError as error:
            broken[recipe.name] = f"model {recipe.model.name}: {error}"
    return Graph(planner.steps.added, goals, unavailable, unlocked, broken)
