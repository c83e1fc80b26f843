"""Files that stand for more than they say: a model or an architecture that `extends` another, a matrix of recipes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlcbuild.recipes import architectures, references
from mlcbuild.recipes.document import Document
from mlcbuild.recipes.problems import Hints, Problem, one_of, show, where
from mlcbuild.recipes.select import AXES, Cell
from mlcbuild.recipes.types import Source

CHECKPOINTS = ("source", "delta_of", "lora", "tokenizer_from")  # keys of a model that say where files are

_PLAIN = (
    "is merged with an unquantized checkpoint, and `source` is a GGUF file: name the checkpoint that it was made from"
)
_BESIDE = {
    "delta_of": _PLAIN,
    "lora": _PLAIN,
    "tokenizer_from": "is for a GGUF file, and `source` is none: its own tokenizer is taken; remove it",
}

Data = Mapping[str, Any]
Key = tuple[str, bool]  # a file's name, and whether it is a stock file whose place another one has taken


def inherit(documents: Mapping[str, Document]) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """Every model's content with what it inherits, and what makes that impossible."""
    return _inherit(documents, {}, _laid_over, _incomplete)


def inherit_architectures(
    documents: Mapping[str, Document], shadowed: Mapping[str, Document]
) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """The same of architectures. `shadowed` are the stock files whose place the workspace's own files have taken.

    A stock file extends the stock one even so: a workspace's `llama` changes no other architecture.
    """
    return _inherit(documents, shadowed, architectures.laid_over, architectures.problems)


def _inherit(
    documents: Mapping[str, Document],
    shadowed: Mapping[str, Document],
    laid_over: Callable[[Data, Data], dict[str, Any]],
    wrong: Callable[[Document, Data, Data], Iterable[Problem]],
) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """A file that extends one that is itself not valid is left out without another problem."""
    files: dict[Key, Document] = {(name, False): each for name, each in documents.items()}
    files |= {(name, True): each for name, each in shadowed.items()}
    merged: dict[Key, dict[str, Any] | None] = {}  # None: it leads to a file that is not valid, or into a circle
    bases: dict[Key, dict[str, Any]] = {}
    problems: list[Problem] = []
    for key in files:
        chain: dict[Key, None] = {}
        at = key  # ends as what is not in the chain: known, not valid, or nothing (the empty name)
        while at in files and at not in merged and at not in chain:
            chain[at] = None
            base = files[at].data.get("extends", "")
            at = (base, files[at].file.stock and base in shadowed)
        if at in chain:
            problems.append(_circle([files[each] for each in [*chain][[*chain].index(at) :]]))
        data = merged.get(at) if at[0] else {}
        for each in reversed(chain):
            bases[each] = data or {}
            data = None if data is None else laid_over(data, references.absolute(files[each]))
            merged[each] = data
    whole: dict[str, dict[str, Any]] = {}
    for (name, hidden), data in merged.items():
        if data is None or hidden:
            continue
        found = list(wrong(documents[name], bases[name, hidden], data))
        problems += found
        if not found:
            whole[name] = data
    return whole, problems


def cells(document: Document, data: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """A matrix's recipes by name, each as a recipe file would say it, and what is wrong with the selections.

    `data` is the document's content with absolute paths.
    """
    axes: list[list[str]] = [data["matrix"][axis] for axis in AXES]
    every: list[Cell] = [(m, q, t) for m, q, t in itertools.product(*axes)]
    problems: list[Problem] = []
    hints = Hints()
    excluded: set[Cell] = set()
    for number, selection in enumerate(data.get("exclude", ())):
        problems += _unknown(document, selection, ("exclude", number), axes, hints)
        excluded.update(_selected(selection, every))
    kept = [cell for cell in every if cell not in excluded]
    if not kept:
        problems.append(document.problem("`exclude` leaves no cell to build", ("exclude",), key=True))
    common = {key: data[key] for key in ("manual",) if key in data}
    settings: dict[Cell, dict[str, Any]] = {cell: dict(common) for cell in kept}
    for number, item in enumerate(data.get("adjust", ())):
        path = ("adjust", number, "when")
        unknown = _unknown(document, item["when"], path, axes, hints)
        problems += unknown
        selected = _selected(item["when"], kept)
        if kept and not selected and not unknown:
            problems.append(document.problem("`when` matches no cell, `exclude` has removed them all", path))
        for cell in selected:
            settings[cell] = _merge(settings[cell], {key: value for key, value in item.items() if key != "when"})
    recipes: dict[str, dict[str, Any]] = {}
    for cell in kept:
        name = "-".join(cell)
        if name in recipes:
            text = f"two cells have the name `{name}`; exclude one of them"
            problems.append(document.problem(text, ("matrix",), key=True))
        recipes[name] = {**dict(zip(AXES, cell, strict=True)), **settings[cell]}
    return recipes, problems


def _merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` laid over `base`, mapping by mapping."""
    merged = dict(base)
    for key, value in own.items():
        inherited = base.get(key)
        merged[key] = _merge(inherited, value) if isinstance(value, dict) and isinstance(inherited, dict) else value
    return merged


def _circle(members: Sequence[Document]) -> Problem:
    """One problem, not one for each member and for each file that leads into the circle."""
    names = [each.file.name for each in members]
    name = min(names)
    start = names.index(name)
    text = f"`extends` goes in a circle: {' → '.join([*names[start:], *names[:start], name])}"
    return members[start].problem(text, ("extends",))


def _laid_over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in own.items() if key != "extends"}
    # Another checkpoint, not another revision of it.
    replaced = {key for key in CHECKPOINTS if own.get(key, {}).keys() & {"path", "hf"}}
    return _merge({key: value for key, value in base.items() if key not in replaced}, own)


def _incomplete(document: Document, _: Data, data: Data) -> list[Problem]:
    problems = []
    for key in CHECKPOINTS:
        source = data.get(key)
        if source is None:
            continue
        if "path" in source and "revision" in source:
            text = (
                f"`{key}.revision` needs a repository, and the inherited {key} is a folder; "
                "add `hf` or remove `revision`"
            )
            problems.append(document.problem(text, (key, "revision"), key=True))
        elif not source.keys() & {"path", "hf"}:
            problems.append(document.problem(f"`{key}`: expected `path` or `hf`", (key,)))
    if "delta_of" in data and "lora" in data and not {"delta_of", "lora"} <= document.data.keys():
        own, other = ("delta_of", "lora") if "delta_of" in document.data else ("lora", "delta_of")
        text = f"`{own}`: the model that it extends has a `{other}`; one of the two"
        problems.append(document.problem(text, (own,) if own in document.data else ("extends",), key=True))
    source = data.get("source", {})
    gguf = Source(Path(str(source["path"])) if "path" in source else None, file=source.get("file")).gguf
    for key, text in _BESIDE.items():
        if key in data and gguf == (key != "tokenizer_from"):
            at = next(each for each in (key, "source", "extends") if each in document.data)
            problems.append(document.problem(f"`{key}`: {text}", (at,), key=True))
    return problems


def _selected(selection: Mapping[str, Any], cells: Sequence[Cell]) -> list[Cell]:
    """The cells that have the values of `selection`; a part that it does not mention stands for every value."""
    wanted = [(AXES.index(axis), _listed(choice)) for axis, choice in selection.items()]
    return [cell for cell in cells if all(cell[axis] in names for axis, names in wanted)]


def _unknown(
    document: Document,
    selection: Mapping[str, Any],
    path: tuple[str | int, ...],
    axes: Sequence[Sequence[str]],
    hints: Hints,
) -> list[Problem]:
    """A problem for each value of `selection` that the matrix does not have."""
    problems = []
    for axis, choice in selection.items():
        names = axes[AXES.index(axis)]
        for number, name in enumerate(_listed(choice)):
            if name not in names:
                hint = hints(name, names) or f"; there is {one_of(names)}"
                place = (*path, axis, number) if isinstance(choice, list) else (*path, axis)
                text = (
                    f"`{where(place)}` is `{show(name)}`, which matches no cell: expected a {axis} of this matrix{hint}"
                )
                problems.append(document.problem(text, place))
    return problems


def _listed(choice: str | Sequence[str]) -> Sequence[str]:
    return [choice] if isinstance(choice, str) else choice
