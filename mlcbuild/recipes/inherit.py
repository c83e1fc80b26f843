"""`extends`: what a model or an architecture takes from another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mlcbuild.recipes import architectures, references
from mlcbuild.recipes.document import Document
from mlcbuild.recipes.problems import Problem

CHECKPOINTS = ("source", "delta_of", "lora")  # keys of a model that say where files are


def merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` laid over `base`, mapping by mapping."""
    merged = dict(base)
    for key, value in own.items():
        inherited = base.get(key)
        merged[key] = merge(inherited, value) if isinstance(value, dict) and isinstance(inherited, dict) else value
    return merged


Data = Mapping[str, Any]


def inherit_models(documents: Mapping[str, Document]) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
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
    whole: dict[str, dict[str, Any]] = {}
    problems: list[Problem] = []
    for name, document in documents.items():
        chain = _chain(document, documents, shadowed)
        if chain is None:
            continue
        if chain[-1] in chain[:-1]:
            circle = [each.file.name for each in chain[chain.index(chain[-1]) :]]
            if name == min(circle):  # once, not for each member and for each file that leads into the circle
                text = f"`extends` goes in a circle: {' → '.join([name, *_after(circle, name), name])}"
                problems.append(document.problem(text, ("extends",)))
            continue
        base: dict[str, Any] = {}
        for ancestor in reversed(chain[1:]):
            base = laid_over(base, references.absolute(ancestor))
        data = laid_over(base, references.absolute(document))
        found = list(wrong(document, base, data))
        problems += found
        if not found:
            whole[name] = data
    return whole, problems


def _chain(
    document: Document, documents: Mapping[str, Document], shadowed: Mapping[str, Document]
) -> list[Document] | None:
    """`document`, what it extends, and so on; ends with one that is in it twice, if there is a circle."""
    chain = [document]
    while (base := chain[-1].data.get("extends")) is not None:
        found = shadowed.get(base) if chain[-1].file.stock else None
        found = found or documents.get(base)
        if found is None:
            return None
        chain.append(found)
        if found in chain[:-1]:
            break
    return chain


def _after(circle: Sequence[str], name: str) -> list[str]:
    members = list(circle[:-1])
    start = members.index(name)
    return members[start + 1 :] + members[:start]


def _laid_over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in own.items() if key != "extends"}
    # Another checkpoint, not another revision of it.
    replaced = {key for key in CHECKPOINTS if own.get(key, {}).keys() & {"path", "hf"}}
    return merge({key: value for key, value in base.items() if key not in replaced}, own)


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
        own = "delta_of" if "delta_of" in document.data else "lora"
        text = (
            f"`{own}`: the model that it extends has a `{'lora' if own == 'delta_of' else 'delta_of'}`; one of the two"
        )
        problems.append(document.problem(text, (own,) if own in document.data else ("extends",), key=True))
    return problems
