"""What recipes want, and why some of them get nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from mlcbuild.engine.graph import Goal, Graph, Step
from mlcbuild.errors import MlcBuildError, NotLocked, Unavailable
from mlcbuild.recipes.types import Recipe


def goals_of(steps: Mapping[str, Step], goal: Callable[[Recipe], Goal], recipes: Iterable[Recipe]) -> Graph:
    """The graph of `steps`, to which `goal` adds what it makes of each recipe."""
    goals: dict[str, Goal] = {}
    unavailable: dict[str, str] = {}
    unlocked: dict[str, str] = {}
    broken: dict[str, str] = {}
    for recipe in recipes:
        try:
            goals[recipe.name] = goal(recipe)
        except Unavailable as error:
            unavailable[recipe.name] = str(error)
        except NotLocked as error:
            unlocked[recipe.name] = str(error)
        except MlcBuildError as error:
            broken[recipe.name] = f"model {recipe.model.name}: {error}"
    return Graph(steps, goals, unavailable, unlocked, broken)
