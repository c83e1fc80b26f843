"""`recipe=a,b-*,c model=… quantization=… target=…`: which recipes are meant."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from mlcbuild.errors import RecipeError
from mlcbuild.recipes.problems import did_you_mean
from mlcbuild.recipes.types import Catalog, Recipe

AXES = ("model", "quantization", "target")

Cell = tuple[str, str, str]  # the names of a recipe's model, quantization and target


@dataclass(frozen=True)
class Wanted:
    """A selection as it was asked for: each a comma list of names and globs; None: all of them."""

    recipe: str | None = None
    model: str | None = None
    quantization: str | None = None
    target: str | None = None
    changed: str | None = None  # a git revision: only what changed since (mlcbuild.recipes.changed)

    @property
    def asks(self) -> bool:
        """Whether recipes are asked for by what they are, which includes those that are built only then."""
        return any(getattr(self, axis) is not None for axis in ("recipe", *AXES))


def cells(recipes: Mapping[str, Recipe]) -> dict[str, Cell]:
    return {name: (each.model.name, each.quantization.name, each.target.name) for name, each in recipes.items()}


def manual(recipes: Mapping[str, Recipe]) -> list[str]:
    """The names of those that are built only when they are asked for."""
    return [name for name, recipe in recipes.items() if recipe.manual]


def select(catalog: Catalog, pattern: str) -> list[Recipe]:
    """The recipes that a comma list of names and globs (`*`, `?`, `[...]`) means, each once, in the list's order.

    Raises RecipeError with a suggestion for every name and glob that matches nothing.
    """
    return [catalog.recipes[name] for name in choose(cells(catalog.recipes), Wanted(pattern))]


def choose(recipes: Mapping[str, Cell], wanted: Wanted, manual: Collection[str] = ()) -> list[str]:
    """The names of the recipes that are wanted, in the order of `recipe=`, else of `recipes`.

    Those in `manual` are only among them where recipes are asked for by name, model, quantization or target. Raises
    RecipeError with a suggestion for every name and glob that matches nothing, and where no recipe is left.
    """
    problems: list[str] = []
    chosen = [name for name in recipes if wanted.asks or name not in manual]
    if wanted.recipe is not None:
        chosen, wrong = _matching("recipe", wanted.recipe, recipes)
        problems += wrong
    for position, axis in enumerate(AXES):
        pattern = getattr(wanted, axis)
        if pattern is not None:
            names, wrong = _matching(axis, pattern, dict.fromkeys(cell[position] for cell in recipes.values()))
            problems += wrong
            chosen = [name for name in chosen if recipes[name][position] in names]
    if problems:
        raise RecipeError(problems)
    if not chosen and wanted.asks:
        asked = [f"{axis}={text}" for axis in ("recipe", *AXES) if (text := getattr(wanted, axis)) is not None]
        raise RecipeError([f"no recipe is all of {' '.join(asked)}; `mlcbuild plan` lists what there is"])
    return chosen


def _matching(axis: str, pattern: str, known: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names that `pattern` means, each once, and what is wrong with it."""
    names = list(known)
    present = set(names)
    found: dict[str, None] = {}
    problems = []
    for word in (part.strip() for part in pattern.split(",")):
        matching = [word] if word in present else [name for name in names if fnmatch.fnmatchcase(name, word)]
        found.update(dict.fromkeys(matching))
        if not matching:
            problems.append(_nothing(axis, names, pattern, word))
    return list(found), problems


def _nothing(axis: str, names: list[str], pattern: str, word: str) -> str:
    if not word:
        return f"{axis}={pattern}: a name is missing; write names and globs with commas between them"
    is_glob = any(character in word for character in "*?[")
    if not names:
        what = f"no {axis} {'matches' if is_glob else 'is named'} `{word}`"
        return f"{what}; this workspace has no recipes"
    if axis == "recipe":
        what = "no recipe matches" if is_glob else "no recipe is named"
        return f"{what} `{word}`{did_you_mean(word, names) or '; `doit list --all` names them'}"
    what = f"no recipe has a {axis} that matches" if is_glob else f"no recipe has the {axis}"
    return f"{what} `{word}`{did_you_mean(word, names) or f'; there are {_some(names)}'}"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:12])
    return f"{shown} … ({len(names)} in all)" if len(names) > 12 else shown
