"""The whole content of an architecture file: what it extends laid under it, its short forms written out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlcbuild.recipes.document import Document
from mlcbuild.recipes.problems import Problem, did_you_mean, where

Data = Mapping[str, Any]

_OWN = ("extends", "without", "match", "model_type", "tested_against")  # of one file, not of those that extend it


def laid_over(base: Data, own: Data) -> dict[str, Any]:
    """`own`, as its file has it, over the whole `base` (empty where `own` extends nothing), less what it is `without`.

    Mappings are laid over key by key; everything else replaces what was there, a rule of `config` too. `model_config`
    comes out as a mapping and `parameters` as a list of whole lines.
    """
    whole = {key: value for key, value in base.items() if key not in _OWN}
    for place in own.get("without", ()):
        whole = _less(whole, place)
    for key, value in own.items():
        inherited = whole.get(key)
        if key == "parameters":
            whole[key] = list(_parameters(inherited or (), value))
        elif key == "model_config":
            whole[key] = {**(inherited or {}), **value} if isinstance(value, Mapping) else dict(_pairs(value))
        elif isinstance(value, Mapping) and isinstance(inherited, Mapping):
            whole[key] = {**inherited, **value}
        elif key not in ("extends", "without"):
            whole[key] = value
    return whole


def problems(document: Document, base: Data, whole: Data) -> Iterator[Problem]:
    """Where the file changes or takes away what the `base` that it extends does not have."""
    left = base
    for place in document.data.get("without", ()):
        left = _less(left, place)
    roles = [line["role"] for line in left.get("parameters", ())]
    for index, place in enumerate(document.data.get("without", ())):
        if _less(base, place) == base:
            known = [*base, *(f"{key}.{name}" for key, value in base.items() for name in _names(value))]
            text = f"`{where(('without', index))}` is `{place}`, which the architecture that it extends does not have"
            yield document.problem(text + did_you_mean(place, known), ("without", index))
    own = document.data.get("parameters", {})
    for at, item in own.items() if isinstance(own, Mapping) else enumerate(own):
        role = at if isinstance(own, Mapping) else item if isinstance(item, str) else item["role"]
        if role not in roles and (isinstance(own, Mapping) or "name" not in item):
            text = f"`{where(('parameters', at))}`: the architecture that it extends has no line of the role `{role}`"
            yield document.problem(text + did_you_mean(role, roles), ("parameters", at))
    for key in ("config", "parameters", "model_config"):
        if key not in whole:
            yield document.problem(f"`without` leaves no `{key}`: name what is in it", ("without",))
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "context_window_size") if "config" in whole else ():
        if key not in whole["config"]:
            yield document.problem(f"`config.{key}` is missing", ("without",))


def _less(whole: Data, place: str) -> dict[str, Any]:
    """`whole` without the key `a`, or without `b` in its `a`: in `parameters` the lines of that role."""
    section, _, name = place.partition(".")
    rest: Any = whole.get(section)
    if name and isinstance(rest, Mapping):
        rest = {key: value for key, value in rest.items() if key != name}
    elif name and section == "parameters":
        rest = [line for line in rest or () if line["role"] != name]
    kept = {key: value for key, value in whole.items() if name or key != section}
    return {**kept, section: rest} if name and section in whole else kept


def _names(section: Any) -> Iterator[str]:
    if isinstance(section, Mapping):
        yield from section
    elif isinstance(section, list):
        yield from (line["role"] for line in section if isinstance(line, Mapping))


def _pairs(items: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """A name alone is MLC's key and ours."""
    for item in items:
        yield from [(item, item)] if isinstance(item, str) else item.items()


def _parameters(base: Sequence[Data], own: Data | Sequence[Any]) -> Iterator[Data]:
    """A mapping changes lines of `base` by their roles. A list says all, in order: one without a name is `base`'s."""
    if isinstance(own, Mapping):
        yield from ({**line, **own.get(line["role"], {})} for line in base)
        return
    for item in own:
        change = {"role": item} if isinstance(item, str) else item
        mine = [{**line, **change} for line in base if line["role"] == change["role"]]
        yield from [change] if "name" in change else mine
