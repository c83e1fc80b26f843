"""`recipe=a,b-*,c model=… quantization=… target=…` and tasks' names: which recipes are meant."""

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
class Selection:
    """What a command is about, as it was asked for: comma lists of names and globs (None: all), and names of tasks.

    Planning a model of a hub needs its entry in recipes.lock. A build looks up the models that it is about (`runs`); a
    command that only shows something looks up none.
    """

    recipe: str | None = None
    model: str | None = None
    quantization: str | None = None
    target: str | None = None
    changed: str | None = None  # a git revision: only what changed since (mlcbuild.recipes.changed)
    strict: bool = False  # every recipe has to be buildable on this machine, and not only those asked for by name
    runs: bool = False  # tasks are run
    whole: bool = True  # everything that is selected is meant (`doit build`), and not only what tasks are named for
    recipes: tuple[str, ...] = ()  # names and globs from tasks like `build:NAME`
    models: tuple[str, ...] = ()  # what follows the colon of tasks like `quantize:MODEL-q4f16_1`
    others: bool = False  # tasks are named that could be any recipe's

    @property
    def asks(self) -> bool:
        """Whether recipes are asked for by what they are, which includes those that are built only then."""
        return any(getattr(self, axis) is not None for axis in ("recipe", *AXES))

    def demanded(self, names: Iterable[str]) -> list[str]:
        """Those of these recipes that have to be buildable on this machine."""
        asked = {name.strip() for name in (self.recipe or "").split(",")}
        return [name for name in names if self.strict or name in asked]

    def chosen(self, recipes: Mapping[str, Cell], manual: Collection[str]) -> list[str]:
        """The recipes that are meant; `manual` are those that are built only when they are asked for.

        Where nothing is run and no name was given, that is all of them. Raises RecipeError.
        """
        names = choose(recipes, self, manual if self.runs or self.whole else ())
        if self.asks or self.changed is not None:
            return names
        return list(dict.fromkeys([*names, *(name for name in recipes if self.others or self._names(name, recipes))]))

    def to_look_up(self, selected: Iterable[str], recipes: Mapping[str, Cell]) -> list[str]:
        """The recipes among `selected` whose models are to be looked up on their hub where they are not locked."""
        return [name for name in selected if self.runs and (self.whole or self._names(name, recipes))]

    def _names(self, recipe: str, recipes: Mapping[str, Cell]) -> bool:
        model = recipes[recipe][0]
        return any(fnmatch.fnmatchcase(recipe, pattern) for pattern in self.recipes) or any(
            word == model or word.startswith(f"{model}-") for word in self.models
        )


def cells(recipes: Mapping[str, Recipe]) -> dict[str, Cell]:
    return {name: (each.model.name, each.quantization.name, each.target.name) for name, each in recipes.items()}


def manual(recipes: Mapping[str, Recipe]) -> list[str]:
    """The names of those that are built only when they are asked for."""
    return [name for name, recipe in recipes.items() if recipe.manual]


def select(catalog: Catalog, pattern: str) -> list[Recipe]:
    """The recipes that a comma list of names and globs (`*`, `?`, `[...]`) means, each once, in the list's order.

    Raises RecipeError with a suggestion for every name and glob that matches nothing.
    """
    return [catalog.recipes[name] for name in choose(cells(catalog.recipes), Selection(pattern))]


def choose(recipes: Mapping[str, Cell], selection: Selection, manual: Collection[str] = ()) -> list[str]:
    """The names of the recipes that are wanted, in the order of `recipe=`, else of `recipes`.

    Those in `manual` are only among them where recipes are asked for by name, model, quantization or target. Raises
    RecipeError with a suggestion for every name and glob that matches nothing, and where no recipe is left.
    """
    problems: list[str] = []
    chosen = [name for name in recipes if selection.asks or name not in manual]
    if selection.recipe is not None:
        chosen, wrong = _matching("recipe", selection.recipe, recipes)
        problems += wrong
    for position, axis in enumerate(AXES):
        pattern = getattr(selection, axis)
        if pattern is not None:
            names, wrong = _matching(axis, pattern, dict.fromkeys(cell[position] for cell in recipes.values()))
            problems += wrong
            chosen = [name for name in chosen if recipes[name][position] in names]
    if problems:
        raise RecipeError(problems)
    if not chosen and selection.asks:
        asked = [f"{axis}={text}" for axis in ("recipe", *AXES) if (text := getattr(selection, axis)) is not None]
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
