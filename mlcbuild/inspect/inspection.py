"""`mlcbuild inspect`: everything that can be said of a checkpoint without building it, as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlcbuild.chat.checkpoint import CheckpointChat, embedding_metadata, read_checkpoint_chat
from mlcbuild.checkpoints.index import as_stored, index, with_prefix
from mlcbuild.checkpoints.table import read_table
from mlcbuild.errors import MlcBuildError
from mlcbuild.inspect import template as templates
from mlcbuild.inspect.checkpoint import Checkpoint, adapter_config
from mlcbuild.inspect.reuse import Reuse, reuse
from mlcbuild.inspect.sizes import Size, sizes
from mlcbuild.merging import prequantized
from mlcbuild.models import architecture as architectures
from mlcbuild.models import parameters
from mlcbuild.models.parameters import Parameter
from mlcbuild.models.structure import Structure
from mlcbuild.models.wrappers import unwrapped
from mlcbuild.planning.files import checkpoint_files
from mlcbuild.planning.shapes import merged_config
from mlcbuild.recipes.types import Architecture, Catalog

# Of no interest to a reader, or shown elsewhere.
_HIDDEN = ("architecture", "rules", "ignored", "disaggregation", "tensor_parallel_shards", "pipeline_parallel_stages")


@dataclass(frozen=True)
class Tensors:
    """Of a local checkpoint: how many, their dtypes, and whether they are what the architecture needs."""

    count: int
    dtypes: Mapping[str, int]
    problem: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """Of its tokenizer, as it was read."""

    count: int
    special: int
    info: Mapping[str, Any]
    ends: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What there is to say; None: there is no such thing, or it could not be looked at."""

    checkpoint: Checkpoint
    architecture: Architecture
    structure: Structure
    parameters: int
    tensors: Tensors | None
    tokens: Tokens | None
    chat: CheckpointChat | None
    template: templates.Guess | None
    sizes: Mapping[str, Size]
    reuse: Reuse
    embedding: Mapping[str, Any] | None  # of a model of texts: how its vectors are made

    @property
    def lacks_rows(self) -> bool:
        """Whether there are more tokens than the model has rows for."""
        return self.tokens is not None and self.tokens.count > self.structure.vocab_size

    @property
    def has_problem(self) -> bool:
        """Whether it says PROBLEM somewhere: what could not be built."""
        vectors = self.embedding is not None and "problem" in self.embedding
        return vectors or self.lacks_rows or (self.tensors is not None and self.tensors.problem is not None)

    @property
    def choices(self) -> dict[str, Any]:
        """The structure's dimensions and choices; what a model has not, or has as everybody, is left out."""
        hidden = {*_HIDDEN, "rope_theta"} if self.structure.rope == "none" else _HIDDEN
        fields = {**self.structure.to_json(), "embedding": self.embedding}
        return {
            key: value
            for key, value in fields.items()
            if key not in hidden and value is not None and value is not False and value != ()
        }


def inspect_checkpoint(checkpoint: Checkpoint, catalog: Catalog, like: str) -> Inspection:
    """Everything about a checkpoint. `like` is what it is called.

    Raises MlcBuildError for an architecture that is not supported, and for a tokenizer that cannot be read.
    """
    model = checkpoint.model
    chosen = architectures.choose(catalog.architectures, checkpoint.config, model.architecture if model else None)
    structure = architectures.resolve(chosen, checkpoint.config, model.overrides if model else {})
    if model and model.lora and structure.tie_word_embeddings:
        merged = merged_config(structure, checkpoint.config, adapter_config(model, catalog))
        structure = architectures.resolve(chosen, merged, model.overrides)
    chat = read_checkpoint_chat(checkpoint.files)
    guess = None if checkpoint.trouble else templates.guess(chat, catalog.templates, like)
    embedding = structure.embedding
    if embedding is not None:
        guess = guess and replace(guess, remarks=())  # nobody talks to it
        try:
            embedding = embedding_metadata(checkpoint.files, embedding)
        except MlcBuildError as error:
            embedding = {"problem": str(error)}
    return Inspection(
        checkpoint,
        chosen,
        structure,
        parameters.count(structure),
        _tensors(checkpoint, structure),
        _tokens(chat),
        chat,
        guess,
        sizes(structure, catalog.quantizations),
        reuse(structure, catalog),
        embedding,
    )


def to_json(inspection: Inspection) -> dict[str, Any]:
    """The inspection as JSON-able data."""
    checkpoint, tokens = inspection.checkpoint, inspection.tokens
    return {
        "source": {"path": str(checkpoint.source.path)} if checkpoint.source.path else {"hf": checkpoint.source.hf},
        "model": checkpoint.model.name if checkpoint.model else None,
        "commit": checkpoint.locked.commit if checkpoint.locked else None,
        "locked": checkpoint.locked is not None and not checkpoint.fresh,
        "files": dict(checkpoint.sizes),
        "architecture": inspection.architecture.name,
        "model_type": inspection.architecture.model_type,
        "structure": inspection.structure.label,
        "choices": inspection.choices,
        "parameters": inspection.parameters,
        "tensors": inspection.tensors and asdict(inspection.tensors),
        "tokenizer": None
        if tokens is None
        else {"tokens": tokens.count, "special": tokens.special, **tokens.info, "ends": tokens.ends},
        "template": inspection.template and asdict(inspection.template),
        "quantizations": {
            name: {"problem": size.problem}
            if size.problem
            else {"weights": size.weights, "cache": size.cache, "tokens": size.tokens}
            for name, size in inspection.sizes.items()
        },
        "libraries": inspection.reuse.same,
        "libraries_with_other_limits": inspection.reuse.close,
        "recipes_unknown_until_locked": inspection.reuse.unknown,
        "trouble": checkpoint.trouble,
    }


def _tensors(checkpoint: Checkpoint, structure: Structure) -> Tensors | None:
    """What the headers of a local checkpoint's files say; nothing is read of a repository's."""
    if checkpoint.source.path is None:
        return None
    notes: list[str] = []
    try:
        wanted = parameters.parameters(structure)
        ignored = parameters.ignored(structure)
        if checkpoint.source.gguf:
            return _gguf_tensors(checkpoint, wanted, ignored)
        checkpoint_files(checkpoint.source.path)
        names = [*(source for parameter in wanted for source in parameter.sources), *ignored]
        table = read_table(checkpoint.files, note=notes.append)
        table = unwrapped(table) if structure.wrapped else table
        table = with_prefix(table, structure.optional_prefix, names, notes.append)
    except MlcBuildError as error:
        return Tensors(0, {}, str(error))
    dtypes = Counter(ref.dtype for ref in table.values())
    problem = None
    try:
        scheme = prequantized.scheme(checkpoint.config)
        if scheme is not None:
            notes.append(f"{scheme.title} quantized it to {scheme.size}")
        elif checkpoint.model is None or (checkpoint.model.delta_of is None and checkpoint.model.lora is None):
            index(wanted, table, ignored, notes.append)
    except MlcBuildError as error:
        problem = str(error)
    return Tensors(len(table), dict(dtypes), problem, tuple(notes))


def _gguf_tensors(checkpoint: Checkpoint, wanted: Sequence[Parameter], ignored: Collection[str]) -> Tensors:
    from mlcbuild.gguf import checkpoint as gguf
    from mlcbuild.gguf import tensors

    notes: list[str] = []
    paths = {name: path for name, path in checkpoint.files.items() if name.endswith(gguf.SUFFIX)}
    header, problem = gguf.read(paths), None
    dtypes = Counter(tensors.kind(each).name for each in header.tensors.values())
    try:
        table, _ = tensors.read(header, paths, {}, wanted, checkpoint.config)
        index(as_stored(wanted, table), table, ignored, notes.append)
    except MlcBuildError as error:
        problem = str(error)
    return Tensors(len(header.tensors), dict(dtypes), problem, tuple(notes))


def _tokens(chat: CheckpointChat | None) -> Tokens | None:
    if chat is None:
        return None
    tokenizer = chat.tokenizer
    ends = tuple(text for i in chat.end_ids if (text := tokenizer.text(i)) is not None)
    return Tokens(len(tokenizer.tokens), len(tokenizer.special), tokenizer.info, ends)
