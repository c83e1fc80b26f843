"""Which files of a checkpoint a step takes: by patterns, so that another file changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlcbuild.cache.tree import matches
from mlcbuild.chat.config import TOKENIZER_FILES
from mlcbuild.errors import MlcBuildError
from mlcbuild.regular import nowhere

CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*_Pooling/config.json")
_TORCH_FILES = ("pytorch_model*.bin", "*.pth")  # read where there are no safetensors
TENSOR_FILES = ("config.json", "*.gguf", "*.safetensors", "*.safetensors.index.json", "*.bin.index.json", *_TORCH_FILES)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
TOKEN_FILES = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "tokenizer_config.json", "rwkv_vocab_v*.txt")
POOLING_FILES = ("modules.json", "*_Pooling/config.json", "sentence_bert_config.json")
# What is taken of a checkpoint for its tokenizer alone: its config.json is another model's.
OTHER_TOKENIZER = (*TOKENIZER_FILES, "chat_template.jinja", "special_tokens_map.json", "generation_config.json")
TEXT_FILES = (
    *TOKENIZER_FILES,
    *("chat_template.jinja", "special_tokens_map.json", "config.json", "generation_config.json"),
    *("rwkv_vocab_v*.txt", *POOLING_FILES),
)


def checkpoint_files(folder: Path) -> tuple[str, ...]:
    """Patterns of a local folder's files: the same weights as pickles beside safetensors are not even hashed."""
    named = any(folder.glob("*.safetensors")) or not folder.is_dir()
    if not named and not any(any(folder.glob(pattern)) for pattern in _TORCH_FILES):
        folders = sorted({path.parent.name for path in folder.glob("*/*.safetensors")})
        if folders:
            raise MlcBuildError(
                f"{folder}: no weights beside config.json: they lie in the folder {folders[0]}/: move them, with their "
                "index, to config.json, or name the folder that has both as the source"
            )
    return CHECKPOINT_FILES if named else (*CHECKPOINT_FILES, *_TORCH_FILES)


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a local folder, by name. Raises MlcBuildError for what a step would take and is no file."""
    found = {path.name: path for path in sorted(folder.iterdir()) if not path.is_dir()}
    for name, path in found.items():
        if not path.is_file() and matches(name, CHECKPOINT_FILES):
            raise MlcBuildError(f"{path}: cannot be read{nowhere(path) or ': it is not a regular file'}")
    return {name: path for name, path in found.items() if path.is_file()}


def only_tokenizer(files: Mapping[str, Path]) -> dict[str, Path]:
    """Of a checkpoint's files those that count where only its tokenizer is wanted."""
    return {name: path for name, path in files.items() if matches(name, OTHER_TOKENIZER)}


def check_adapter(folder: Path | None) -> None:
    """Raises MlcBuildError for a local folder in which no adapter is."""
    name = ADAPTER_FILES[0]
    if folder is not None and folder.is_dir() and not (folder / name).is_file():
        text = f"lora: {folder}: no {name}: an adapter in PEFT's format has one"
        raise MlcBuildError(text + inner(folder, name))


def inner(folder: Path, file: str) -> str:
    """What is added where a file is in folders of this one: the last that a training run wrote, `checkpoint-10`."""
    found = sorted((path.parent.name for path in folder.glob(f"*/{file}")), key=lambda name: (len(name), name))
    return f"; the folder {found[-1]}/ has it: name that one" if found else ""
