"""`mlcbuild new`: the model file of a checkpoint, and what its writer does not know."""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mlcbuild.errors import MlcBuildError
from mlcbuild.inspect import template as templates
from mlcbuild.inspect.checkpoint import Checkpoint, open_checkpoint, source_of
from mlcbuild.inspect.inspection import Inspection, inspect_checkpoint
from mlcbuild.inspect.inspection_text import quantizations
from mlcbuild.inspect.sizes import CONVERSATION
from mlcbuild.models.kinds import by_layer
from mlcbuild.recipes.files import NAME, NAME_RULE, write_new
from mlcbuild.recipes.lockfile import key
from mlcbuild.recipes.problems import did_you_mean
from mlcbuild.recipes.types import AUTO_TEMPLATE, Catalog, Locked, Model, Source
from mlcbuild.text import amount
from mlcbuild.workspace.hub_locks import locker, resolve, store_entry

_SMALL, _MUCH = 700_000_000, 0.3  # parameters, and the part of them that a vocabulary has
_SCHEMA = "# yaml-language-server: $schema=../../schema/model.schema.json\n"


@dataclass(frozen=True)
class Wish:
    """What the command line says: a folder or a repository, and what is not to be guessed. `memory` is bytes."""

    word: str
    name: str | None = None
    revision: str | None = None
    template: str | None = None
    delta_of: str | None = None  # the base that the checkpoint is the difference to: a folder or a repository
    lora: str | None = None  # likewise, an adapter to be merged with it
    memory: int = 8_000_000_000


def write_model_file(
    wish: Wish, catalog: Catalog, cache: Path, say: Callable[[str], None] = print, dry_run: bool = False
) -> None:
    """Write recipes/models/NAME.yaml, lock a repository that is not locked, and say what is not known and comes next.

    With `dry_run` the file's text is said and nothing is written. Raises MlcBuildError, with nothing written, for a
    name that is taken, for a template that there is not, and as `open_checkpoint` and `inspect_checkpoint` do.
    """
    name = wish.name or suggested(wish.word)
    path = _free(catalog, name)
    if wish.template is not None and wish.template not in {*catalog.templates, AUTO_TEMPLATE.name}:
        hint = did_you_mean(wish.template, catalog.templates) or "; `recipes/templates/` has them"
        raise MlcBuildError(f"no template is named `{wish.template}`{hint}")
    others = {key: source_of(word, catalog) for key, word in _others(wish).items()}
    with open_checkpoint(wish.word, catalog, wish.revision, names=False) as checkpoint:
        if checkpoint.source.gguf and others:
            raise MlcBuildError(
                f"{wish.word}: a GGUF file; deltas and adapters are merged with unquantized checkpoints"
            )
        inspection = inspect_checkpoint(replace(checkpoint, model=_merged(checkpoint, others)), catalog, name)
    chosen, remarks = _template(wish, inspection, catalog)
    locks = _to_lock(inspection.checkpoint, others, catalog)
    text = "".join(f"{line}\n" for line in _lines(inspection, chosen, wish, path, others))
    if dry_run:
        say(text.rstrip())
    else:
        write_new(path, text)
        say(f"wrote      {path.relative_to(catalog.root)}")
        for source, locked in locks.items():
            store_entry(catalog.root, cache, key(source), locked)
            size = amount(sum(file.size for file in locked.files.values()))
            say(f"locked     {source} at {locked.commit[:12]}, {len(locked.files)} files, {size}")
    for line in _unknown(inspection, remarks):
        say("note       " + line.replace("\n", "\n           "))
    for line in _next(inspection, name, wish):
        say(f"next       {line}")


def suggested(word: str) -> str:
    """A model's name from a repository's or a folder's: `Qwen/Qwen2.5-0.5B` is `qwen2.5-0.5b`."""
    last = Path(word).resolve().name if Path(word).is_dir() else word.rstrip("/").rpartition("/")[2]
    last = re.sub(r"(-00001-of-\d{5})?\.gguf$", "", last.removeprefix("hf:"))
    name = re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._")
    if not name:
        raise MlcBuildError(f"{word}: no name for a model follows from this: choose one with --name")
    return name


def _free(catalog: Catalog, name: str) -> Path:
    """Where the file goes. Raises MlcBuildError where that is taken, or the name is none."""
    if not NAME.fullmatch(name):
        raise MlcBuildError(f"--name {name}: {NAME_RULE}")
    folder = catalog.root / "recipes" / "models"
    for taken in (folder / f"{name}.yaml", folder / f"{name}.yml"):
        if taken.exists() or taken.is_symlink():
            shown = taken.relative_to(catalog.root)
            raise MlcBuildError(f"{shown} is there already; nothing was written: choose another name with --name")
    if name in catalog.models:
        raise MlcBuildError(
            f"a model `{name}` comes with mlcbuild, and a file of that name would take its place; nothing was written: "
            "choose another name with --name"
        )
    return folder / f"{name}.yaml"


def _others(wish: Wish) -> dict[str, str]:
    """What the checkpoint is to be merged with, by the key of the model file. Raises MlcBuildError for both."""
    if wish.delta_of is not None and wish.lora is not None:
        raise MlcBuildError("--delta-of and --lora: one of the two")
    given = {"delta_of": wish.delta_of, "lora": wish.lora}
    return {key: word for key, word in given.items() if word is not None}


def _merged(checkpoint: Checkpoint, others: Mapping[str, Source]) -> Model | None:
    """The model to be, where its checkpoint alone is not all of it."""
    return (
        Model("", checkpoint.source, "", delta_of=others.get("delta_of"), lora=others.get("lora")) if others else None
    )


def _to_lock(checkpoint: Checkpoint, others: Mapping[str, Source], catalog: Catalog) -> dict[Source, Locked]:
    """Entries for repositories that have none yet. Raises CheckpointError where a hub does not give one out."""
    locks = {checkpoint.source: checkpoint.locked} if checkpoint.fresh and checkpoint.locked is not None else {}
    for source in others.values():
        if source.hf is not None and locker(catalog.root)(Model("", source, "")) is None:
            locks[source] = resolve(source)
    return locks


def _template(wish: Wish, inspection: Inspection, catalog: Catalog) -> tuple[str, tuple[str, ...]]:
    """The template to write, and remarks on it."""
    if wish.template is not None:
        if wish.template == AUTO_TEMPLATE.name or inspection.embedding is not None:  # nobody talks to a model of texts
            return wish.template, ()
        return wish.template, templates.differences(catalog.templates[wish.template], inspection.chat)
    if inspection.template is None:
        return AUTO_TEMPLATE.name, ("the tokenizer's files could not be had, so the template is the checkpoint's own",)
    return inspection.template.name, inspection.template.remarks


def _lines(
    inspection: Inspection, template: str, wish: Wish, path: Path, others: Mapping[str, Source]
) -> Iterator[str]:
    """Those of the model file, which is to lie at `path`."""
    structure = inspection.structure
    yield _SCHEMA.rstrip()
    yield (
        f"# {inspection.architecture.name}, {inspection.parameters:,} parameters, "
        f"{structure.num_hidden_layers} layers, {_context(structure.context_window_size)} ({structure.label})."
    )
    for name, source in {"source": inspection.checkpoint.source, **others}.items():
        if source.path is not None:
            yield f"{name}: {{path: {json.dumps(_written(source.path, path.parent), ensure_ascii=False)}}}"
        else:
            revision = f", revision: {json.dumps(source.revision, ensure_ascii=False)}" if source.revision else ""
            file = f", file: {json.dumps(source.file, ensure_ascii=False)}" if source.file else ""
            yield f"{name}: {{hf: {source.hf}{file}{revision}}}"
    yield f"template: {template}"
    yield f"# Weights by quantization, with keys and values of so many tokens, that fit into {amount(wish.memory)}:"
    yield from (f"#   {line}" for line in quantizations(inspection, wish.memory))
    if structure.context_window_size > CONVERSATION:
        yield f"# overrides: {{context_window_size: {CONVERSATION}}}    # a shorter context takes less memory"


def _context(size: int) -> str:
    return f"a context of {size:,} tokens" if size > 0 else "texts of any length"


def _written(folder: Path, start: Path) -> str:
    """The folder as seen from `start`; absolute where the two have nothing in common."""
    target, origin = folder.resolve(), start.resolve()
    alike = Path(os.path.commonpath([target, origin]))
    return str(target) if alike == alike.parent else os.path.relpath(target, origin)


def _unknown(inspection: Inspection, remarks: tuple[str, ...]) -> Iterator[str]:
    """What the file may have wrong."""
    checkpoint = inspection.checkpoint
    for remark in remarks:
        yield f"template: {remark}"
    if checkpoint.trouble is not None:
        yield f"the tokenizer was not looked at: {checkpoint.trouble}"
    elif inspection.tokens is None:
        yield "there is no tokenizer.json and no tokenizer.model: a package needs one"
    elif inspection.tokens.count > inspection.structure.vocab_size:
        rows = inspection.structure.vocab_size
        yield f"the tokenizer has {inspection.tokens.count:,} tokens, the model only {rows:,} rows"
    if inspection.tensors is None:
        yield "the weights were not looked at: the first build finds tensors that are missing or left over"
    elif inspection.tensors.problem is not None:
        yield f"the weights do not fit: {inspection.tensors.problem}"
    if inspection.tensors is not None:
        yield from inspection.tensors.notes


def _next(inspection: Inspection, name: str, wish: Wish) -> Iterator[str]:
    fitting = [each for each, size in inspection.sizes.items() if size.problem is None and size.total <= wish.memory]
    wanted = _proposed(inspection)
    format_ = next((each for each in (wanted, "q4f16_1") if each in fitting), min(fitting, default=wanted))
    yield f"write recipes/{name}-cpu.yaml: {{model: {name}, quantization: {format_}, target: cpu}}"
    yield f"mlcbuild test-run {name}-cpu    # every step, on a small random model of this structure"
    yield f"doit build recipe={name}-cpu"


def _proposed(inspection: Inspection) -> str:
    """A quantization that passes its gate: small models lose much at 4 bits, as do those that are mostly vocabulary."""
    structure = inspection.structure
    of_vocabulary = structure.vocab_size * structure.hidden_size / inspection.parameters
    if inspection.parameters > _SMALL and of_vocabulary < _MUCH:
        return "q4f16_1"
    return "q4f16_mixed" if by_layer(structure) else "q8f16_1"
