"""Models that see images or hear: the text model inside, as it is without one. `wrappers.json` lists them.

A wrapper's `text_config` (or its whole config.json, as Qwen2-VL's hub has it) describes a text model that has an
architecture of its own, so it shares its library. Its tensors are told from the others by the beginnings of names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from mlcbuild.recipes.types import Architecture

Config = Mapping[str, Any]

# How names of a text model's tensors begin inside a wrapper, and alone: as hubs have them, and as transformers 4.52
# and later write them. The first that a checkpoint has counts.
_BEGINNINGS = (
    ("model.language_model.", "model."),
    ("language_model.", ""),
    ("model.text_model.", "model."),
)
_TIED = "tie_word_embeddings"


@cache
def _tables() -> tuple[Any, ...]:
    """wrappers.json's parts in their order."""
    return tuple(json.loads((Path(__file__).parent / "wrappers.json").read_text(encoding="utf-8")).values())


def known() -> tuple[str, ...]:
    """Every wrapper's model_type."""
    return tuple(sorted(_tables()[0]))


def text_type(config: Config) -> str | None:
    """The model_type of the text model in this wrapper's config.json; None where it is no wrapper's."""
    if config.get("model_type") not in known():
        return None
    inner = _own_type(config)
    return str(_tables()[1].get(inner, inner))


def _own_type(config: Config) -> str:
    return str((config.get("text_config") or {}).get("model_type", _tables()[0][config["model_type"]]))


def wrapping(architecture: Architecture, wrapper: str) -> Architecture:
    """The architecture of a text model for the wrapper's config.json and checkpoints."""
    types = architecture.match.get("model_type", ())
    data = {**architecture.data, "wrapper": wrapper}
    return replace(architecture, data=data, match={**architecture.match, "model_type": (*types, wrapper)})


def text_config(config: Config) -> Config:
    """The text model's own config.json. Embeddings are tied as transformers ties those of the wrapper."""
    _, _, defaults, _, beside = _tables()
    inner = config.get("text_config") or config
    found = {key: value for key, value in inner.items() if key not in beside}
    default = {**defaults.get(_own_type(config), {}), **defaults.get(config["model_type"], {})}
    if "rope_parameters" in found:
        default.pop("rope_theta", None)
    return {**default, **found, **_tied(config, inner)}


def _tied(config: Config, inner: Config) -> dict[str, bool]:
    """Whether embeddings are tied, of a wrapper and its text model; nothing where the text model's default counts."""
    given, name = config.get(_TIED), config["model_type"]
    unless, either, within = _tables()[3]
    if name in either:
        return {_TIED: bool(given or inner.get(_TIED))}
    if given is None and name in within:
        return {_TIED: inner[_TIED]} if _TIED in inner else {}
    return {_TIED: name in unless if given is None else given}


def alone(config: Config) -> Config:
    """The config.json that the text model would have alone; a config that is no wrapper's as it is."""
    inner = text_type(config)
    return config if inner is None else {**text_config(config), "model_type": inner}


def unwrapped(table: Mapping[str, Any]) -> dict[str, Any]:
    """What a wrapper's checkpoint has of its text model, by the names that it has alone."""
    for inside, alone in _BEGINNINGS:
        if any(name.startswith(inside) for name in table):
            found = {name.removeprefix(inside): ref for name, ref in table.items() if name.startswith(inside)}
            head = {name: ref for name, ref in table.items() if name.startswith("lm_head.")}
            return {name if name.startswith("lm_head.") else alone + name: ref for name, ref in (found | head).items()}
    return {name: ref for name, ref in table.items() if name.startswith(("model.", "backbone.", "lm_head."))}
