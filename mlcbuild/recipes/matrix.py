"""A matrix file as the recipes of its cells."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mlcbuild.recipes.document import Document
from mlcbuild.recipes.inherit import merge
from mlcbuild.recipes.problems import Problem, did_you_mean, one_of, show, where

_AXES = ("model", "quantization", "target")

Cell = tuple[str, str, str]  # model, quantization, target


def expand(document: Document, data: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """Recipes by name, each as a recipe file would say it, and what is wrong with the selections.

    `data` is the document's content with absolute paths.
    """
    axes: list[list[str]] = [data["matrix"][axis] for axis in _AXES]
    cells: list[Cell] = [(m, q, t) for m, q, t in itertools.product(*axes)]
    problems: list[Problem] = []
    excluded: set[Cell] = set()
    for number, selection in enumerate(data.get("exclude", ())):
        problems += _unknown(document, selection, ("exclude", number), axes)
        excluded.update(_select(selection, cells))
    kept = [cell for cell in cells if cell not in excluded]
    if not kept:
        problems.append(document.problem("`exclude` leaves no cell to build", ("exclude",), key=True))
    common = {key: data[key] for key in ("manual",) if key in data}
    settings: dict[Cell, dict[str, Any]] = {cell: dict(common) for cell in kept}
    for number, item in enumerate(data.get("adjust", ())):
        path = ("adjust", number, "when")
        unknown = _unknown(document, item["when"], path, axes)
        problems += unknown
        selected = _select(item["when"], kept)
        if kept and not selected and not unknown:
            problems.append(document.problem("`when` matches no cell, `exclude` has removed them all", path))
        for cell in selected:
            settings[cell] = merge(settings[cell], {key: value for key, value in item.items() if key != "when"})
    recipes: dict[str, dict[str, Any]] = {}
    for cell in kept:
        name = "-".join(cell)
        if name in recipes:
            text = f"two cells have the name `{name}`; exclude one of them"
            problems.append(document.problem(text, ("matrix",), key=True))
        recipes[name] = {**dict(zip(_AXES, cell, strict=True)), **settings[cell]}
    return recipes, problems


def _select(selection: Mapping[str, Any], cells: Sequence[Cell]) -> list[Cell]:
    """The cells that have the values of `selection`; a part that it does not mention stands for every value."""
    wanted = [(_AXES.index(axis), _listed(choice)) for axis, choice in selection.items()]
    return [cell for cell in cells if all(cell[axis] in names for axis, names in wanted)]


def _unknown(
    document: Document, selection: Mapping[str, Any], path: tuple[str | int, ...], axes: Sequence[Sequence[str]]
) -> list[Problem]:
    """A problem for each value of `selection` that the matrix does not have."""
    problems = []
    for axis, choice in selection.items():
        names = axes[_AXES.index(axis)]
        for number, name in enumerate(_listed(choice)):
            if name not in names:
                hint = did_you_mean(name, names) or f"; there is {one_of(names)}"
                place = (*path, axis, number) if isinstance(choice, list) else (*path, axis)
                text = (
                    f"`{where(place)}` is `{show(name)}`, which matches no cell: expected a {axis} of this matrix{hint}"
                )
                problems.append(document.problem(text, place))
    return problems


def _listed(choice: str | Sequence[str]) -> Sequence[str]:
    return [choice] if isinstance(choice, str) else choice
