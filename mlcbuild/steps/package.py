"""Package: the weights folder as it can be uploaded, and the library beside it.

<model>-<quantization>-MLC/         shards and index (nothing copied), tokenizer files, mlc-chat-config.json
<model>-<quantization>-<target>.<so|dylib|dll|tar|wasm>
chat.html                           for browsers
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from mlcbuild.chat import rwkv_vocabulary
from mlcbuild.chat.checkpoint import CheckpointChat, embedding_metadata, read_checkpoint_chat, with_ends
from mlcbuild.chat.config import TOKENIZER_FILES, chat_config, to_text
from mlcbuild.chat.conversation import Conversation, from_data
from mlcbuild.chat.derive import AUTO, derive
from mlcbuild.chat.jinja import CHAT_TEMPLATE
from mlcbuild.chat.tokenizer_info import SPECIAL_MAP, read_json
from mlcbuild.engine.job import Job, Tree
from mlcbuild.errors import MlcBuildError

VERSION = 1
TOOLS = ("jinja2", "sentencepiece")

_INDEX, _OLDER_INDEX = "tensor-cache.json", "ndarray-cache.json"
_CONFIGS = ("generation_config.json", "config.json")  # the first to give a sampling default wins


def run(job: Job) -> None:
    """Fields: model, quantization, target (names), template {name, ...}, model_type, model_config; format (the
    quantization's, told to runtimes: how weights were rounded into it is nothing to them); for a model of texts also
    embedding: the architecture's embedding_metadata.

    Entry, for browsers: what makes the page of a model, from its name and those of its weights and its library.
    Inputs: `quantize` (params_shard_N.bin, tensor-cache.json), `library` (model.<suffix>), `checkpoint` (tokenizer
    files, chat_template.jinja, config.json, generation_config.json). Raises MlcBuildError where the checkpoint has no
    tokenizer, and where the template `auto` cannot be derived from it.
    """
    fields = job.fields
    stem = f"{fields['model']}-{fields['quantization']}"
    weights = f"{stem}-MLC"
    for name, entry in job.inputs["quantize"].files.items():
        job.reuse(entry, f"{weights}/{name}")
    job.reuse(job.inputs["quantize"].files[_INDEX], f"{weights}/{_OLDER_INDEX}")
    name, entry = library_file(job.inputs["library"])
    library = f"{stem}-{fields['target']}{name.removeprefix('model')}"
    job.reuse(entry, library)

    checkpoint = job.inputs["checkpoint"]
    present = [file for file in TOKENIZER_FILES if file in checkpoint]
    chat = read_checkpoint_chat({name: entry.path for name, entry in checkpoint.files.items()})
    if chat is None:
        raise MlcBuildError(
            f"{fields['model']}: the checkpoint has neither tokenizer.json nor tokenizer.model "
            "(nor a vocabulary of RWKV)"
        )
    rows = fields["model_config"]["vocab_size"]
    if chat.tokenizer.rows > rows:
        job.note(
            f"the tokenizer has tokens up to {chat.tokenizer.rows - 1}, but the model has {rows} rows: a text with one "
            "of those beyond must not be given to it"
        )
    beyond = [i for i in chat.end_ids if i >= rows]
    if beyond:
        job.note(
            f"a text ends at token {beyond[0]}, say the configs, but the model has {rows} rows and never writes it"
        )
    folder = job.output / weights
    folder.mkdir()
    for file in [*present, *(name for name in (CHAT_TEMPLATE, SPECIAL_MAP) if name in checkpoint)]:
        # Copied: a local checkpoint's files belong to the user and may change after the package is made.
        shutil.copyfile(checkpoint.path(file), folder / file)
    present += rwkv_vocabulary.write_packed({name: e.path for name, e in checkpoint.files.items()}, folder)
    config = chat_config(
        fields["model_type"],
        fields["format"],
        fields["model_config"],
        _conversation(job, chat),
        chat.tokenizer,
        present,
        [read_json(checkpoint.path(name)) for name in _CONFIGS if name in checkpoint],
        _embedding(job),
        chat.special,
    )
    (folder / "mlc-chat-config.json").write_text(to_text(config), encoding="utf-8")
    if job.has_entry:
        (job.output / "chat.html").write_text(job.entry(stem, weights, library), encoding="utf-8")


def _embedding(job: Job) -> dict[str, Any] | None:
    """How the package makes vectors; None for a model that writes."""
    default = job.fields.get("embedding")
    if default is None:
        return None
    found = embedding_metadata({name: entry.path for name, entry in job.inputs["checkpoint"].files.items()}, default)
    if _told(found) != _told(default):
        job.note(
            f"vectors are made as modules.json says ({_told(found)}); MLC's engine reads the library's own "
            f"({_told(default)}) and must be told otherwise"
        )
    return found


def _told(metadata: Mapping[str, Any]) -> str:
    return f"pooling {metadata['pooling_strategy']}, {'' if metadata['normalize'] else 'not '}normalised"


def library_file(tree: Tree) -> tuple[str, Any]:
    """The library of a build step's artifact: its name there, `model.so`, and its entry."""
    found = [(name, entry) for name, entry in tree.files.items() if name.startswith("model.")]
    if len(found) != 1:
        raise MlcBuildError(f"the library's artifact holds {sorted(tree.files)}, expected one file model.<suffix>")
    return found[0]


def _conversation(job: Job, chat: CheckpointChat) -> Conversation:
    template: Mapping[str, Any] = job.fields["template"]
    if template["name"] != AUTO:
        return with_ends(from_data(template["name"], template), chat)
    derived = derive(chat)
    for note in derived.notes:
        job.note(f"template {AUTO}: {note}")
    return derived.conversation
