"""What planning reads of a model: its config.json, and the structure and forms of libraries that follow from it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.errors import POINTER, MlcBuildError, NotLocked, pointer
from mlcbuild.gguf import checkpoint
from mlcbuild.gguf.checkpoint import local_parts
from mlcbuild.models import architecture as architectures
from mlcbuild.models import parameters
from mlcbuild.models.few_layers import one_layer, two_layers
from mlcbuild.models.kinds import TEXT_WINDOW, by_layer
from mlcbuild.models.structure import Structure
from mlcbuild.models.tied import tied_embedding, unties
from mlcbuild.models.tied import untied as untied_config
from mlcbuild.planning.files import ADAPTER_FILES, check_adapter, inner
from mlcbuild.recipes.types import Architecture, Catalog, Locked, Model, Quantization, Source, Verify
from mlcbuild.regular import nowhere, open_regular

# What config.json calls the length up to which such a scaling leaves texts as they are.
_ORIGINAL = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}

LARGEST_CONFIG = 4 << 20  # bytes


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
    notes: tuple[str, ...]  # what a user of the package has to know
    untied: bool = False  # the adapter makes two of what the base ties


def shape_of(
    catalog: Catalog,
    model: Model,
    config: Mapping[str, Any],
    overrides: Mapping[str, int],
    adapter: Mapping[str, Any] | None = None,
) -> Shape:
    """The shape of a model with this config.json, and the configuration of the adapter that is merged with it.

    Raises MlcBuildError where no architecture describes it.
    """
    chosen = architectures.choose(catalog.architectures, config, model.architecture)
    structure = architectures.resolve(chosen, config, overrides)
    merged, untied = merged_config(structure, config, adapter), False
    if merged is not config:
        config, structure = merged, architectures.resolve(chosen, merged, overrides)
        untied = not structure.tie_word_embeddings
    return Shape(
        structure.to_json(),
        parameters.count(structure),
        architectures.model_config(chosen, structure, config),
        _form(structure),
        _form(two_layers(structure), "-two-layers"),
        _form(one_layer(structure), "-blocks", blocks=True) if by_layer(structure) else None,
        (*_chosen_by_hand(chosen, config), *_one_table(structure), *_all_keys(chosen, structure)),
        untied,
    )


def merged_config(
    structure: Structure, config: Mapping[str, Any], adapter: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """config.json of a base with this structure and an adapter: another one where that unties what the base ties."""
    # A model of texts has no output matrix.
    tied = tied_embedding(parameters.parameters(structure)) if adapter and structure.embedding is None else None
    return untied_config(config) if adapter and tied and unties(adapter, tied) else config


def _chosen_by_hand(architecture: Architecture, config: Mapping[str, Any]) -> Iterator[str]:
    model_type = config.get("model_type")
    if model_type not in architecture.match.get("model_type", ()):
        yield (
            f"`architecture: {architecture.name}` was chosen by hand for the model_type {model_type}: nothing but the "
            "unquantized model's own figures tells whether it computes what it was trained to"
        )


def _all_keys(architecture: Architecture, structure: Structure) -> Iterator[str]:
    if structure.indexer:
        yield (
            f"the model chooses {structure.indexer[0]} keys for each token. Texts that it is measured with have "
            f"{TEXT_WINDOW} tokens, and figures say nothing about the choice where these are fewer. For texts of up to "
            f"{structure.indexer[0]} tokens, `overrides: {{context_window_size: {structure.indexer[0]}}}` makes a "
            "smaller and faster library, which leaves the choice out"
        )
    elif "context_at_most" in architecture.data:
        yield (
            f"the model chooses keys for each token. Within {structure.context_window_size} tokens "
            "it chooses all of them, so the library attends to all and leaves the choice out: it is not for "
            "longer texts"
        )


def _one_table(structure: Structure) -> Iterator[str]:
    """Scalings of rope that depend on the text's length (mlcbuild.models.rope)."""
    scaling = structure.rope_scaling or {}
    kind, window = scaling.get("rope_type", ""), structure.context_window_size
    original = scaling.get(_ORIGINAL.get(kind, ""), window)
    if window > original:
        yield (
            f"rope scaling {kind}: this library turns every text as one of {window} tokens; transformers turns texts "
            f"of up to {original:g} tokens otherwise, and so computes other numbers for them. For short texts use "
            f"`overrides: {{context_window_size: {original:g}}}`"
        )


def config_of(model: Model, lock: Callable[[Model], Locked | None]) -> Mapping[str, Any]:
    """The model's config.json, from its folder or from recipes.lock; of a GGUF file, what follows from its header.

    Raises MlcBuildError where it cannot be read.
    """
    if model.source.path is not None and model.source.gguf:
        paths = {path.name: path for path in local_parts(model.source.path)}
        return checkpoint.config_of(checkpoint.read(paths), paths)
    if model.source.path is not None:
        return read_config(model.source.path / "config.json")
    found = lock(model)
    if found is None:
        raise NotLocked(f"{model.source} is not in recipes.lock: `mlcbuild lock {model.name}` asks the hub")
    return found.config


def adapter_of(model: Model, lock: Callable[[Source], Locked]) -> Mapping[str, Any] | None:
    """The configuration of the adapter that is merged with the model, from its folder or recipes.lock; or None.

    Raises MlcBuildError where it cannot be read.
    """
    if model.lora is None:
        return None
    if model.lora.path is None:
        return lock(model.lora).config
    check_adapter(model.lora.path)
    path = model.lora.path / ADAPTER_FILES[0]
    return read_config(path) if path.exists() else {}


def read_config(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises MlcBuildError where it is none, or more than a configuration can be."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_CONFIG:
                raise MlcBuildError(f"{path}: {size:,} bytes; a config.json has at most {LARGEST_CONFIG:,}")
            content = file.read(LARGEST_CONFIG)
        if content.startswith(POINTER):
            raise MlcBuildError(pointer(str(path)))
        config = json.loads(content.decode("utf-8"))  # as the steps read it, and transformers
    except FileNotFoundError:
        text = f"{path}: no such file: a checkpoint in Hugging Face format has one"
        raise MlcBuildError(text + (nowhere(path) or inner(path.parent, path.name))) from None
    except OSError as error:
        raise MlcBuildError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise MlcBuildError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise MlcBuildError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def _form(structure: Structure, ending: str = "", blocks: bool = False) -> Form:
    return Form(f"{structure.digest}{ending}", f"{structure.label}{ending}", structure.library_json(), blocks)


def format_name(quantization: Quantization) -> str:
    """The name of the format whose bytes these are: roundings and classes of one format share its libraries."""
    return quantization.format or quantization.name


def prefix(form: Form, quantization: str) -> str:
    """What the symbols of a static library begin with: an app may hold several, and variants share one."""
    model, _, digest = form.label.rpartition("-")
    return re.sub(r"[^A-Za-z0-9_]", "_", f"{model}_{quantization}_{digest}_")


def method_of(shape: Shape, verify: Verify) -> str:
    """How a package is measured (mlcbuild.verify.measure)."""
    if shape.fields.get("embedding") is not None:
        return "embeddings"
    return "layers" if shape.blocks is not None and _too_large(shape, verify) else "whole"


def _too_large(shape: Shape, verify: Verify) -> bool:
    """By a declared bound and not by this machine's memory: `quality.json` shall be the same everywhere."""
    return 4 * shape.parameters > verify.memory * 1e9
