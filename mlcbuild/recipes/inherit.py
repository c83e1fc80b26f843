"""`extends`: what a model takes from another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlcbuild.recipes import references
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


def inherit(models: Mapping[str, Document]) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """Every model's content with what it inherits, and what makes that impossible.

    A model that extends one that is itself not valid is left out without another problem.
    """
    whole: dict[str, dict[str, Any]] = {}
    problems: list[Problem] = []
    for name in models:
        chain = _chain(name, models)
        if chain is None:
            continue
        if chain[-1] in chain[:-1]:
            circle = chain[chain.index(chain[-1]) :]
            if name == min(circle):  # once, not for each member and for each model that leads into the circle
                text = f"`extends` goes in a circle: {' → '.join([name, *_after(circle, name), name])}"
                problems.append(models[name].problem(text, ("extends",)))
            continue
        data: dict[str, Any] = {}
        for ancestor in reversed(chain):
            data = _laid_over(data, references.absolute(models[ancestor]))
        found = _incomplete(models[name], data)
        problems += found
        if not found:
            whole[name] = data
    return whole, problems


def _chain(name: str, models: Mapping[str, Document]) -> list[str] | None:
    """`name`, what it extends, and so on; ends with a name that is in it twice, if there is a circle."""
    chain = [name]
    while (base := models[chain[-1]].data.get("extends")) is not None:
        chain.append(base)
        if base not in models:
            return None
        if base in chain[:-1]:
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


def _incomplete(document: Document, data: Mapping[str, Any]) -> list[Problem]:
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
