"""A workspace's YAML files, read, checked and resolved."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from mlcbuild.errors import RecipeError
from mlcbuild.recipes import convert, document, expand, references
from mlcbuild.recipes.document import Document, Memo
from mlcbuild.recipes.files import FOLDERS, LONGEST_NAME, STOCK_KINDS, File, discover, stock, strays
from mlcbuild.recipes.lockfile import examine
from mlcbuild.recipes.problems import Hints, Problem, listed, show
from mlcbuild.recipes.schemas import Schemas
from mlcbuild.recipes.select import AXES
from mlcbuild.recipes.types import AUTO_TEMPLATE, Catalog, Recipe
from mlcbuild.text import plural

T = TypeVar("T")
Documents = dict[str, dict[str, Document]]  # kind -> name -> file


@dataclass(frozen=True)
class Reading:
    """What became of a workspace's files; `catalog` is None where something is wrong with any of them."""

    catalog: Catalog | None
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    counts: Mapping[str, int]  # kind -> files of it, stock files included

    @property
    def ok(self) -> bool:
        return not self.problems


def load(root: Path, memo: Path | None = None) -> Catalog:
    """The recipes of the workspace `root` and everything that they can name. Raises RecipeError with all problems.

    `memo` is a file that remembers which contents are valid, so that the next call neither parses nor validates them.
    """
    reading = read(root, memo)
    if reading.catalog is None:
        raise RecipeError(listed(reading.problems, str))
    return reading.catalog


def read(root: Path, memo: Path | None = None) -> Reading:
    """`load`, with the problems as data. Raises RecipeError where there is no workspace at all."""
    root = root.absolute()
    if not (root / "recipes").is_dir():
        text = f"{root}: no folder `recipes` here, so this is not a workspace; `mlcbuild init DIR` makes one"
        raise RecipeError([text])
    files, shadowed, problems, warnings = _files(root)
    schemas = Schemas(stock().schema)
    memory = Memo(memo, schemas.digest)
    documents: Documents = {kind: {} for kind in FOLDERS}
    for file in files:
        found, wrong = document.read(file, schemas, memory)
        problems += wrong
        if found is not None:
            documents[file.kind][file.name] = found
    extended = {file.name: document.read(file, schemas, memory)[0] for file in shadowed if file.kind == "architecture"}
    memory.save()
    # A file with a mistake in it is not also an unknown name.
    names = {kind: [file.name for file in files if file.kind == kind] for kind in FOLDERS}
    known = {kind: dict.fromkeys(sorted(names[kind])) for kind in names}
    known["template"] = dict.fromkeys(sorted([*names["template"], AUTO_TEMPLATE.name]))
    hints = Hints()
    for each in itertools.chain.from_iterable(by_name.values() for by_name in documents.values()):
        problems += references.check(each, known, hints)
    shadows = {name: each for name, each in extended.items() if each is not None}
    catalog, wrong = _resolve(root, documents, shadows, warnings)
    problems += wrong
    counts = {kind: len(names[kind]) for kind in FOLDERS}
    return Reading(None if problems else catalog, tuple(sorted(set(problems))), tuple(warnings), counts)


def check(root: Path) -> Reading:
    """Everything that is wrong with a workspace's files, recipes.lock included: `mlcbuild check`.

    Raises RecipeError only where `root` is no workspace.
    """
    reading = read(root)
    return replace(reading, problems=tuple(sorted({*reading.problems, *examine(root.absolute())[1]})))


def render(reading: Reading) -> str:
    """A reading as text: each problem with its line of YAML, then one line that sums up."""
    parts = listed(reading.problems, Problem.with_source)
    parts += [f"{warning.file}: warning: {warning.text}" for warning in reading.warnings]
    every = sum(reading.counts.values())
    if reading.problems:
        files = len({problem.file for problem in reading.problems})
        parts.append(f"{_number(len(reading.problems), 'problem')} in {_number(files, 'file')} of {every}")
    else:
        recipes = len(reading.catalog.recipes) if reading.catalog else 0
        numbers = {"recipe": recipes, **{kind: reading.counts[kind] for kind in STOCK_KINDS}}
        counted = ", ".join(_number(number, kind) for kind, number in numbers.items())
        parts.append(f"{_number(every, 'file')} valid: {counted}")
    return "\n".join(parts) + "\n"


def _files(root: Path) -> tuple[list[File], list[File], list[Problem], list[Problem]]:
    """The workspace's files and the stock files that none of them shadows; those that one does; problems; warnings."""
    own, problems = discover(root / "recipes", root, FOLDERS)
    problems += strays(root / "recipes", root)
    problems += [
        Problem(file.shown, 1, 1, "rename the file: `template: auto` means the one that a checkpoint brings")
        for file in own
        if (file.kind, file.name) == ("template", AUTO_TEMPLATE.name)
    ]
    if stock().recipes.samefile(root / "recipes"):
        return own, [], problems, []
    spare, damaged = discover(stock().recipes, root, STOCK_KINDS)
    spare = [replace(file, stock=True) for file in spare]
    spare_names = {(file.kind, file.name) for file in spare}
    own_names = {(file.kind, file.name) for file in own}
    warnings = [
        Problem(file.shown, 1, 1, f"takes the place of the stock {file.kind} `{file.name}`")
        for file in own
        if (file.kind, file.name) in spare_names
    ]
    shadowed = [file for file in spare if (file.kind, file.name) in own_names]
    return own + [file for file in spare if file not in shadowed], shadowed, problems + damaged, warnings


def _resolve(
    root: Path, documents: Documents, shadowed: Mapping[str, Document], warnings: Sequence[Problem]
) -> tuple[Catalog, list[Problem]]:
    """The catalog of what can be resolved, and why the rest cannot, unknown names aside."""
    models, problems = expand.inherit(documents["model"])
    architectures, wrong = expand.inherit_architectures(documents["architecture"], shadowed)
    problems += wrong
    formats, wrong = convert.quantizations(documents["quantization"])
    problems += wrong
    catalog = Catalog(
        root=root,
        recipes={},
        models=_sorted(models, convert.model),
        architectures=_sorted(architectures, convert.architecture),
        quantizations=formats,
        targets=_converted(documents["target"], convert.target),
        templates=_converted(documents["template"], convert.template),
        warnings=tuple(str(warning) for warning in warnings),
    )
    wanted: dict[str, tuple[Document, dict[str, Any]]] = {
        name: (each, references.absolute(each)) for name, each in documents["recipe"].items()
    }
    for each in documents["matrix"].values():
        cells, wrong = expand.cells(each, references.absolute(each))
        problems += wrong
        for name, data in cells.items():
            if name in wanted:
                other = wanted[name][0].file.shown
                text = f"the cell `{name}` has the name of a recipe of {other}; exclude the cell or rename the recipe"
                problems.append(each.problem(text, ("matrix",), key=True))
            else:
                wanted[name] = (each, data)
    for each, data in wanted.values():
        cell = "-".join(data[axis] for axis in AXES)  # steps are named so, whatever the recipe is called
        if len(cell) > LONGEST_NAME:
            text = f"the names `{show(cell)}` have {len(cell)} characters together, at most {LONGEST_NAME} are possible"
            problems.append(each.problem(text))
    recipes = {name: _recipe(name, *wanted[name], catalog) for name in sorted(wanted)}
    return replace(catalog, recipes={name: recipe for name, recipe in recipes.items() if recipe is not None}), problems


def _recipe(name: str, document: Document, data: Mapping[str, Any], catalog: Catalog) -> Recipe | None:
    """None where one of its names is unknown."""
    model = catalog.models.get(data["model"])
    quantization = catalog.quantizations.get(data["quantization"])
    target = catalog.targets.get(data["target"])
    if model is None or quantization is None or target is None:
        return None
    template = {**catalog.templates, AUTO_TEMPLATE.name: AUTO_TEMPLATE}.get(data.get("template", model.template))
    if template is None:
        return None
    return Recipe(
        name=name,
        model=model,
        quantization=quantization,
        target=target,
        template=template,
        overrides={**model.overrides, **data.get("overrides", {})},
        origin=document.file.shown,
        verify=replace(model.verify, **data["verify"]) if "verify" in data else model.verify,
        manual=data.get("manual", False),
    )


def _converted(documents: Mapping[str, Document], convert: Callable[[str, Mapping[str, Any]], T]) -> dict[str, T]:
    return _sorted({name: each.data for name, each in documents.items()}, convert)


def _sorted(contents: Mapping[str, Mapping[str, Any]], convert: Callable[[str, Mapping[str, Any]], T]) -> dict[str, T]:
    return {name: convert(name, contents[name]) for name in sorted(contents)}


def _number(number: int, noun: str) -> str:
    return f"{number} {plural(number, noun)}"
