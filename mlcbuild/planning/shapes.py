"""What planning reads of a model: its config.json, and the structure and forms of libraries that follow from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.errors import MlcBuildError, NotLocked
from mlcbuild.models import architecture as architectures
from mlcbuild.models import parameters
from mlcbuild.models.kinds import by_layer
from mlcbuild.models.structure import Structure
from mlcbuild.recipes.types import Catalog, Locked, Model


@dataclass(frozen=True)
class Form:
    """What a library is compiled from; with `blocks`, a library of its pieces (mlcbuild.models.layer_pieces)."""

    name: str  # tells it from all others
    label: str
    fields: Mapping[str, Any]
    blocks: bool = False


@dataclass(frozen=True)
class Shape:
    """A model's structure under a recipe's overrides, with what is made from it worked out once."""

    fields: Mapping[str, Any]
    parameters: int  # how many numbers they are
    model_config: Mapping[str, Any]  # of mlc-chat-config.json
    whole: Form
    two_layers: Form  # with the kernels of `whole`
    blocks: Form | None  # None for a kind of model that is not run one layer at a time


def shape_of(catalog: Catalog, model: Model, config: Mapping[str, Any], overrides: Mapping[str, int]) -> Shape:
    """The shape of a model with this config.json. Raises MlcBuildError where no architecture describes it."""
    chosen = architectures.choose(catalog.architectures, config, model.architecture)
    structure = architectures.resolve(chosen, config, overrides)
    return Shape(
        structure.to_json(),
        parameters.count(structure),
        architectures.model_config(chosen, structure, config),
        _form(structure),
        _form(structure.two_layers, "-two-layers"),
        _form(structure.one_layer, "-blocks", blocks=True) if by_layer(structure) else None,
    )


def config_of(model: Model, lock: Callable[[Model], Locked | None]) -> Mapping[str, Any]:
    """The model's config.json, from its folder or from recipes.lock. Raises MlcBuildError where it cannot be read."""
    if model.source.path is not None:
        return read_config(model.source.path / "config.json")
    found = lock(model)
    if found is None:
        raise NotLocked(f"{model.source} is not in recipes.lock: `mlcbuild lock {model.name}` asks the hub")
    return found.config


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))  # as the steps read it, and transformers
    except FileNotFoundError:
        raise MlcBuildError(f"{path}: no such file: a checkpoint in Hugging Face format has one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise MlcBuildError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise MlcBuildError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def _form(structure: Structure, ending: str = "", blocks: bool = False) -> Form:
    return Form(f"{structure.digest}{ending}", f"{structure.label}{ending}", structure.library_json(), blocks)
