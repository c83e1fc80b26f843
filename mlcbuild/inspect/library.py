"""A compiled library looked at, ours or mlc-ai's: what its `_metadata` says, and whose weights it takes."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.models import structure
from mlcbuild.models.parameters import parameters
from mlcbuild.planning.planner import plan
from mlcbuild.quantization.schemes import quantized_parameters
from mlcbuild.recipes.types import Catalog
from mlcbuild.runtime import library_file
from mlcbuild.runtime.library import Metadata, match
from mlcbuild.runtime.package import find_weights
from mlcbuild.runtime.weights import read_index
from mlcbuild.text import amount
from mlcbuild.workspace.hub_locks import locker

SUFFIXES = (".so", ".dylib", ".dll", ".wasm", ".tar")
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class LibraryInspection:
    """`takes` are weights of the workspace's recipes, by their step's name, with the recipes; `weights` is a folder
    that was named, which the library takes."""

    path: Path
    format: str
    metadata: Metadata
    takes: dict[str, tuple[str, ...]]
    unknown: int  # recipes that are not locked
    weights: Path | None


def inspect_library(path: Path, catalog: Catalog, weights: Path | None = None) -> LibraryInspection:
    """Raises MlcBuildError where it is no model's library, and, naming the first difference, where it does not take
    the `weights` folder's tensors."""
    data = path.read_bytes()
    packed = data[:2] == _GZIP  # mlc-ai's static libraries are
    data = gzip.decompress(data) if packed else data
    metadata = library_file.find_metadata(data, path, path.name)
    if weights is not None:
        weights = find_weights(weights) if weights.is_dir() else weights
        match(metadata.parameters, read_index(weights), path.name, weights)
    graph = plan(catalog, catalog.recipes.values(), locker(catalog.root))
    takes: dict[str, tuple[str, ...]] = {}
    for name, goal in graph.goals.items():
        if "allocate" in goal.steps:  # what a budget makes of the model is in the cache, if anywhere
            continue
        fields = graph.steps[goal.steps["quantize"]].fields
        made = quantized_parameters(parameters(structure.from_json(fields["structure"])), goal.recipe.quantization)
        try:
            match(metadata.parameters, made, path, name)
        except MlcBuildError:
            continue
        step = goal.steps["quantize"]
        takes[step] = (*takes.get(step, ()), name)
    format_ = library_file.file_format(data[:4096]) + (", gzip" if packed else "")
    return LibraryInspection(path, format_, metadata, takes, len(graph.unlocked), weights)


def render(inspection: LibraryInspection) -> str:
    """What `mlcbuild inspect LIBRARY` prints."""
    return "".join(f"{line}\n" for line in _lines(inspection))


def to_json(inspection: LibraryInspection) -> dict[str, Any]:
    """The same as JSON-able data."""
    facts = {key: value for key, value in vars(inspection.metadata).items() if key != "parameters"}
    described = [{"name": p.name, "shape": p.shape, "dtype": p.dtype} for p in inspection.metadata.parameters]
    return {
        "library": inspection.path.name,
        "format": inspection.format,
        **facts,
        "parameters": described,
        "takes": inspection.takes,
        "recipes_unknown_until_locked": inspection.unknown,
    }


def _lines(inspection: LibraryInspection) -> Iterator[str]:
    metadata = inspection.metadata
    yield f"library       {inspection.path.name}: {inspection.format}, {amount(inspection.path.stat().st_size)}"
    yield f"model_type    {metadata.model_type}, quantization {metadata.quantization}, task {metadata.model_task}"
    for name in ("context_window_size", "prefill_chunk_size", "sliding_window_size", "max_batch_size", "kv_state_kind"):
        yield f"              {name}: {getattr(metadata, name)}"
    yield f"parameters    {len(metadata.parameters)} tensors"
    if inspection.weights is not None:
        yield f"              those of {inspection.weights}"
    if inspection.takes:
        yield "takes         the weights of these recipes:"
        for step, names in inspection.takes.items():
            yield f"              {step.partition(':')[2]}  {' '.join(names)}"
    else:
        yield "takes         the weights of no recipe of this workspace"
    if inspection.unknown:
        yield f"              ({inspection.unknown} recipes are unknown until locked)"
