"""`recipe=a,b-*,c`: which recipes are meant."""

from __future__ import annotations

import fnmatch

from mlcbuild.errors import RecipeError
from mlcbuild.recipes.problems import did_you_mean
from mlcbuild.recipes.types import Catalog, Recipe


def select(catalog: Catalog, pattern: str) -> list[Recipe]:
    """The recipes that a comma list of names and globs (`*`, `?`, `[...]`) means, each once, in the list's order.

    Raises RecipeError with a suggestion for every name and glob that matches nothing.
    """
    found: dict[str, Recipe] = {}
    problems = []
    for word in (part.strip() for part in pattern.split(",")):
        names = [name for name in catalog.recipes if fnmatch.fnmatchcase(name, word)]
        if word in catalog.recipes:
            names = [word]
        found.update((name, catalog.recipes[name]) for name in names)
        if not names:
            problems.append(_nothing(catalog, pattern, word))
    if problems:
        raise RecipeError(problems)
    return list(found.values())


def _nothing(catalog: Catalog, pattern: str, word: str) -> str:
    if not word:
        return f"recipe={pattern}: a name is missing; write names and globs with commas between them"
    what = "no recipe matches" if any(character in word for character in "*?[") else "no recipe is named"
    hint = did_you_mean(word, catalog.recipes) or "; `doit list --all` names them"
    return f"{what} `{word}`{hint if catalog.recipes else '; this workspace has no recipes'}"
