"""The step that brings a checkpoint's files: from a folder, of a GGUF file, from a repository."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlcbuild.cache.tree import matches
from mlcbuild.engine.graph import Input
from mlcbuild.gguf.checkpoint import local_parts
from mlcbuild.planning.files import OTHER_TOKENIZER, checkpoint_files
from mlcbuild.recipes.types import Locked, Source


def fetched(
    add: Callable[..., str],
    label: str,
    source: Source,
    files: tuple[str, ...] | None,
    lock: Callable[[], Locked],
) -> str:
    """The step's name. `files` are patterns, where not all of the source counts; `lock` gives a repository's entry."""
    if source.path is not None and source.gguf:
        # File by file: their folder may have much else, which would be gone through at every build.
        return add("download", label, {}, tuple(Input(path.name, path=path) for path in local_parts(source.path)))
    if source.path is not None:
        patterns = files if files is not None else checkpoint_files(source.path)
        return add("download", label, {}, (Input("files", path=source.path, select=patterns),))
    locked = lock()
    wanted = {name: file for name, file in locked.files.items() if files != OTHER_TOKENIZER or matches(name, files)}
    contents = {name: {"sha256": file.sha256, "size": file.size} for name, file in wanted.items()}
    fields: dict[str, Any] = {"repo": source.hf, "commit": locked.commit, "files": contents}
    return add("download", label, fields, brings=sum(file.size for file in wanted.values()))


def unpacked(add: Callable[..., str], label: str, download: str, tokenizer: str | None) -> str:
    """The step that makes a checkpoint of a GGUF file, perhaps with the tokenizer that another step fetched."""
    more = (Input("tokenizer", step=tokenizer, select=OTHER_TOKENIZER),) if tokenizer else ()
    return add("unpack", label, {}, (Input("files", step=download), *more), (download,))
