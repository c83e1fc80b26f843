"""What doit's command line is about, as far as that must be known before there are tasks.

Planning a model of a hub needs its entry in recipes.lock. A build looks up the models that it is about; a command that
only shows tasks looks up none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mlcbuild.recipes.select import Cell

# doit's commands that run no task.
_SHOWING = ("clean", "completion", "dumpdb", "forget", "help", "ignore", "info", "list", "reset-dep", "tabcompletion")
_OF_RECIPES = ("build", "package", "verify", "publish")
_OF_MODELS = ("download", "convert", "calibrate", "quantize")


@dataclass(frozen=True)
class Scope:
    """`runs`: tasks are run. `recipes`: names and globs from words like `build:NAME`. `models`: what follows the colon
    of words like `quantize:MODEL-q4f16_1`. `whole`: everything that is selected is meant (`doit build`). `others`:
    steps are named that could be any recipe's."""

    runs: bool = False
    recipes: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    whole: bool = False
    others: bool = False

    def named(self, recipes: Mapping[str, Cell]) -> list[str]:
        """The recipes that tasks were named for."""
        return [name for name, cell in recipes.items() if self._names(name, cell[0])]

    def to_look_up(self, selected: Iterable[str], recipes: Mapping[str, Cell]) -> list[str]:
        """The recipes among `selected` whose models are to be looked up on their hub where they are not locked."""
        if not self.runs:
            return []
        return [name for name in selected if self.whole or self._names(name, recipes[name][0])]

    def _names(self, recipe: str, model: str) -> bool:
        return any(fnmatchcase(recipe, pattern) for pattern in self.recipes) or any(
            word == model or word.startswith(f"{model}-") for word in self.models
        )


def scope_of(arguments: Sequence[str], kinds: Iterable[str]) -> Scope:
    """The scope of doit's command line; `kinds` are the groups of tasks."""
    groups = set(kinds)
    words = [word for word in arguments if not word.startswith("-") and "=" not in word]
    first = next((word for word in words if word in _SHOWING or word in groups or word == "run"), None)
    if first in _SHOWING:
        return Scope()
    tasks = [word.partition(":") for word in words if word.partition(":")[0] in groups]
    by_kind = {kind: [name for of, colon, name in tasks if of == kind and colon] for kind in groups}
    return Scope(
        runs=True,
        recipes=tuple(name for kind in _OF_RECIPES for name in by_kind.get(kind, ())),
        models=tuple(name for kind in _OF_MODELS for name in by_kind.get(kind, ())),
        whole=not tasks or any(not colon for _, colon, _ in tasks),
        others=any(by_kind[kind] for kind in groups - {*_OF_RECIPES, *_OF_MODELS}),
    )
