"""manifest.json: what a package was made of and what is in it. No timestamps, no paths of a machine, sorted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlcbuild import __version__
from mlcbuild.cache.action import Action
from mlcbuild.cache.tree import Entry
from mlcbuild.engine.graph import Goal
from mlcbuild.recipes.types import Recipe, Source

NAME = "manifest.json"
# What is fetched of a model, and by which step.
_FETCHED = {"checkpoint": "download", "delta_of": "base", "lora": "lora", "tokenizer_from": "tokenizer"}


def manifest(goal: Goal, actions: Mapping[str, Action], files: Mapping[str, Entry], quality: Any, device: Any) -> bytes:
    """The manifest's text: `actions` by kind, `files` as installed, `device` as resolved for this build."""
    tools: dict[str, str] = {}
    for action in actions.values():
        tools.update(action.toolchain)
    content = {
        "version": 1,
        "mlcbuild": __version__,
        "recipe": {**_recipe(goal.recipe), "device": device},
        **{
            key: {name: entry.digest for name, entry in actions[kind].tree.files.items()}
            for key, kind in _FETCHED.items()
            if kind in actions
        },
        "steps": {
            kind: {"key": action.key, "tree": action.tree.digest, "inputs": action.inputs}
            for kind, action in actions.items()
        },
        "tools": tools,
        "files": {name: {"sha256": entry.digest, "size": entry.size} for name, entry in files.items()},
        "size": sum(entry.size for entry in files.values()),
        "quality": quality,
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as resolved; a local path is only its last name, because what lies there is given by digest."""
    model = recipe.model
    sources = {key: getattr(model, key) for key in ("source", "delta_of", "lora", "tokenizer_from")}
    return {
        "name": recipe.name,
        "model": {"name": model.name, **{key: _source(each) for key, each in sources.items() if each is not None}},
        "quantization": dataclasses.asdict(recipe.quantization),
        "target": dataclasses.asdict(recipe.target),
        "template": {"name": recipe.template.name, **recipe.template.data},
        "overrides": recipe.overrides,
        "verify": {**dataclasses.asdict(recipe.verify), "text": _last(recipe.verify.text)},
    }


def _source(source: Source) -> dict[str, Any]:
    if source.path is not None:
        return {"path": _last(source.path)}
    return {"hf": source.hf, "revision": source.revision, **({"file": source.file} if source.file else {})}


def _last(path: Path | None) -> str | None:
    return path.name if path is not None else None
