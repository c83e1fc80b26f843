"""Package: the weights folder as it can be uploaded, and the library beside it.

<model>-<quantization>-MLC/         shards and index (nothing copied), tokenizer files, mlc-chat-config.json
<model>-<quantization>-<target>.<so|dylib|dll|tar|wasm>
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any

from mlcbuild.chat.config import TOKENIZER_FILES, chat_config, to_text
from mlcbuild.chat.conversation import from_data
from mlcbuild.errors import MlcBuildError
from mlcbuild.steps.job import Job, Tree

VERSION = 1
CODE = ("mlcbuild.chat",)
TOOLS: tuple[str, ...] = ()

_INDEX, _OLDER_INDEX = "tensor-cache.json", "ndarray-cache.json"
_CONFIGS = ("generation_config.json", "config.json")  # the first to give a sampling default wins


def run(job: Job) -> None:
    """Fields: model, quantization, target (names), template {name, ...}, model_type, model_config.

    Inputs: `quantize` (params_shard_N.bin, tensor-cache.json), `library` (model.<suffix>), `checkpoint` (tokenizer
    files, config.json, generation_config.json). Raises MlcBuildError where the checkpoint has no tokenizer.
    """
    fields = job.fields
    stem = f"{fields['model']}-{fields['quantization']}"
    weights = f"{stem}-MLC"
    for name, entry in job.inputs["quantize"].files.items():
        job.reuse(entry, f"{weights}/{name}")
    job.reuse(job.inputs["quantize"].files[_INDEX], f"{weights}/{_OLDER_INDEX}")
    name, entry = library_file(job.inputs["library"])
    job.reuse(entry, f"{stem}-{fields['target']}{name.removeprefix('model')}")

    checkpoint = job.inputs["checkpoint"]
    present = [file for file in TOKENIZER_FILES if file in checkpoint]
    if "tokenizer.json" not in present and "tokenizer.model" not in present:
        raise MlcBuildError(f"{fields['model']}: the checkpoint has neither tokenizer.json nor tokenizer.model")
    folder = job.output / weights
    folder.mkdir()
    for file in present:
        # Copied: a local checkpoint's files belong to the user and may change after the package is made.
        shutil.copyfile(checkpoint.path(file), folder / file)
    (folder / "mlc-chat-config.json").write_text(to_text(_config(fields, checkpoint, present)), encoding="utf-8")


def library_file(tree: Tree) -> tuple[str, Any]:
    """The library of a build step's artifact: its name there, `model.so`, and its entry."""
    found = [(name, entry) for name, entry in tree.files.items() if name.startswith("model.")]
    if len(found) != 1:
        raise MlcBuildError(f"the library's artifact holds {sorted(tree.files)}, expected one file model.<suffix>")
    return found[0]


def _config(fields: Mapping[str, Any], checkpoint: Tree, present: list[str]) -> dict[str, Any]:
    template = fields["template"]
    return chat_config(
        fields["model_type"],
        fields["quantization"],
        fields["model_config"],
        from_data(template["name"], template),
        _read(checkpoint, "tokenizer.json"),
        present,
        [config for name in _CONFIGS if (config := _read(checkpoint, name))],
    )


def _read(checkpoint: Tree, name: str) -> Mapping[str, Any] | None:
    if name not in checkpoint:
        return None
    content = checkpoint.read_json(name)
    if not isinstance(content, dict):
        raise MlcBuildError(f"{name}: expected a JSON object, found {json.dumps(content)[:40]}")
    return content
