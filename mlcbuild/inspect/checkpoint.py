"""What a word on the command line means (a folder, a repository, a model's name), and that checkpoint's small files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.chat.config import TOKENIZER_FILES
from mlcbuild.checkpoints.locked import check_config
from mlcbuild.errors import CheckpointError, MlcBuildError
from mlcbuild.planning.files import files_of, only_tokenizer
from mlcbuild.planning.shapes import adapter_of, read_config
from mlcbuild.recipes.problems import did_you_mean
from mlcbuild.recipes.types import Catalog, Locked, Model, Source
from mlcbuild.workspace.hub_locks import locker, resolve

_POOLING = ("modules.json", "1_Pooling/config.json")  # of sentence-transformers
_CHAT = ("chat_template.jinja", "special_tokens_map.json", "config.json", "generation_config.json")
_TEXTS = (*TOKENIZER_FILES, *_CHAT, *_POOLING)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint. `model` is the workspace's model that it was named by, `locked` what is known of a repository,
    which was asked just now where `fresh`. `files` are its tokenizer and configs here; `trouble` says why there are
    none. `sizes` are bytes of all files that a build needs."""

    source: Source
    config: Mapping[str, Any]
    sizes: Mapping[str, int]
    files: Mapping[str, Path]
    model: Model | None = None
    locked: Locked | None = None
    fresh: bool = False
    trouble: str | None = None


@contextmanager
def open_checkpoint(
    word: str, catalog: Catalog, revision: str | None = None, names: bool = True
) -> Iterator[Checkpoint]:
    """The checkpoint that `word` means; `files` are there inside the `with` only.

    A folder that exists wins over a repository; with `names`, a model of the catalog over both. Raises MlcBuildError
    where there is no such thing, and CheckpointError where the hub does not give it out.
    """
    model = catalog.models.get(word) if names and revision is None else None
    source = model.source if model is not None else source_of(word, catalog, revision, names)
    if source.gguf:
        with _unpacked(source, model, catalog) as checkpoint:
            yield checkpoint
        return
    if source.path is not None:
        found = files_of(source.path)
        found |= {name: path for name in _POOLING if (path := source.path / name).is_file()}
        sizes = {name: path.stat().st_size for name, path in found.items()}
        yield Checkpoint(source, read_config(source.path / "config.json"), sizes, found, model)
        return
    stand_in = model or Model(word, source, "")
    known = locker(catalog.root)(stand_in) if revision is None or model is not None else None
    locked = known or resolve(source)
    sizes = {name: file.size for name, file in locked.files.items()}
    with tempfile.TemporaryDirectory() as folder:
        files, trouble = _fetched(source, locked, Path(folder))
        if "config.json" in files:
            check_config(locked.config, read_config(files["config.json"]), str(source))
        yield Checkpoint(source, locked.config, sizes, files, model, locked, known is None, trouble)


@contextmanager
def _unpacked(source: Source, model: Model | None, catalog: Catalog) -> Iterator[Checkpoint]:
    """The checkpoint that a GGUF file makes; of a repository's, only the header is fetched."""
    from mlcbuild.gguf import checkpoint, repository, tokenizer

    with tempfile.TemporaryDirectory() as folder:
        locked, fresh = None, False
        if source.path is not None:
            paths = {path.name: path for path in checkpoint.local_parts(source.path)}
            sizes = {name: path.stat().st_size for name, path in paths.items()}
            header = checkpoint.read(paths)
            config = checkpoint.config_of(header, paths)
        else:
            assert source.hf is not None
            known = locker(catalog.root)(model or Model("", source, ""))
            locked, fresh, paths = known or resolve(source), known is None, {}
            sizes = {name: file.size for name, file in locked.files.items()}
            header, config = repository.header(source.hf, locked.commit, list(locked.files)), dict(locked.config)
        made, other, trouble = {"config.json": config}, dict[str, Path](), None
        try:
            if model is not None and model.tokenizer_from is not None:
                other, trouble = _tokenizer(model.tokenizer_from, catalog, Path(folder) / "tokenizer")
            else:
                made |= tokenizer.files(header)
        except CheckpointError as error:
            trouble = str(error)
        for name, content in made.items():
            (Path(folder) / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        files = {**paths, **other, **{name: Path(folder) / name for name in made}}
        yield Checkpoint(source, config, sizes, files, model, locked, fresh, trouble)


def _tokenizer(source: Source, catalog: Catalog, folder: Path) -> tuple[dict[str, Path], str | None]:
    """Another checkpoint's tokenizer, by name; or why there is none."""
    if source.path is not None:
        files, trouble = files_of(source.path), None
    else:
        folder.mkdir()
        files, trouble = _fetched(source, locker(catalog.root)(Model("", source, "")) or resolve(source), folder)
    return only_tokenizer(files), trouble


def adapter_config(model: Model, catalog: Catalog) -> Mapping[str, Any] | None:
    """The adapter_config.json of what is merged with the model, of a repository as it is locked or, else, is now.

    Raises MlcBuildError where it cannot be read.
    """
    lock = locker(catalog.root)
    return adapter_of(model, lambda source: lock(Model("", source, "")) or resolve(source))


def source_of(word: str, catalog: Catalog, revision: str | None = None, names: bool = False) -> Source:
    """The folder, GGUF file or repository that `word` means; `owner/name:Q4_K_M` is a GGUF file of a repository.

    Raises MlcBuildError for a folder that is not there.
    """
    path = Path(word)
    if revision is None and (path.is_dir() or (path.is_file() and path.suffix == ".gguf")):
        return Source(path=path.absolute())
    if path.suffix == ".gguf" and ":" not in word and not path.exists():
        raise MlcBuildError(f"{word}: no such file")
    if revision is not None and path.is_file():
        raise MlcBuildError(f"{word}: a file, and --revision is for a repository")
    if path.is_file():
        raise MlcBuildError(
            f"{word}: a file; a checkpoint is a folder in Hugging Face's format (config.json and safetensors), a GGUF "
            "file, or owner/name"
        )
    repo, _, file = word.removeprefix("hf:").partition(":")
    if file and not word.startswith(("/", ".", "~")):
        return Source(hf=repo, revision=revision, file=file)
    if word.startswith(("/", "./", "../", "~")) or word.count("/") > 1:
        raise MlcBuildError(f"{word}: no such folder; a checkpoint is a folder in Hugging Face's format, or owner/name")
    if "/" not in word and names:
        hint = did_you_mean(word, catalog.models)
        if hint:
            raise MlcBuildError(f"{word}: no folder and no model of this name{hint} (hf:{word} means the repository)")
    return Source(hf=word.removeprefix("hf:"), revision=revision)


def _fetched(source: Source, locked: Locked, folder: Path) -> tuple[dict[str, Path], str | None]:
    """The small files of a repository, by name; or why there are none."""
    from mlcbuild.checkpoints import hub

    assert source.hf is not None
    wanted = {name: file for name, file in locked.files.items() if name in _TEXTS}
    try:
        hub.fetch(source.hf, locked.commit, wanted, folder)
    except CheckpointError as error:
        return {}, str(error)
    return {name: folder / name for name in wanted}, None
