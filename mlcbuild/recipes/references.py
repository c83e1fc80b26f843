"""The values of YAML files that name another file."""

from __future__ import annotations

import os.path
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlcbuild.recipes.document import Document
from mlcbuild.recipes.files import FOLDERS
from mlcbuild.recipes.problems import Hints, Problem, one_of, show, where
from mlcbuild.recipes.types import Source

Place = tuple[str | int, ...]

# For each kind of file, where it names a file of another kind; `*` is every item of a list or a mapping.
_NAMES: dict[str, dict[Place, str]] = {
    "recipe": {
        ("model",): "model",
        ("quantization",): "quantization",
        ("target",): "target",
        ("template",): "template",
    },
    "matrix": {
        ("matrix", "model", "*"): "model",
        ("matrix", "quantization", "*"): "quantization",
        ("matrix", "target", "*"): "target",
        ("adjust", "*", "template"): "template",
    },
    "model": {("extends",): "model", ("template",): "template", ("architecture",): "architecture"},
    "architecture": {("extends",): "architecture"},
    "quantization": {
        ("format",): "quantization",
        ("overrides", "*"): "quantization",
        ("formats", "*"): "quantization",
    },
}
# And where it names a file or a folder by its path, relative to itself.
_PATHS: dict[str, dict[Place, str]] = {
    "recipe": {("verify", "text"): "file"},
    "matrix": {("adjust", "*", "verify", "text"): "file"},
    "model": {
        ("source", "path"): "checkpoint",
        ("delta_of", "path"): "folder",
        ("lora", "path"): "folder",
        ("tokenizer_from", "path"): "folder",
        ("verify", "text"): "file",
        ("calibration", "text"): "file",
    },
}


def check(document: Document, names: Mapping[str, Mapping[str, Any]], hints: Hints) -> Iterator[Problem]:
    """Names that are in no file of `names[kind]` (sorted), and paths that lead nowhere."""
    for pattern, kind in _NAMES.get(document.file.kind, {}).items():
        for path, name in _find(document.data, pattern):
            if name not in names[kind]:
                hint = hints(name, names[kind]) or (
                    f"; there is {one_of(names[kind])}" if names[kind] else "; there is none yet"
                )
                text = f"`{where(path)}` is `{show(name)}`, expected a name of recipes/{FOLDERS[kind]}/{hint}"
                yield document.problem(text, path)
    for pattern, kind in _PATHS.get(document.file.kind, {}).items():
        for path, value in _find(document.data, pattern):
            yield from _check_path(document, path, value, kind)


def absolute(document: Document) -> dict[str, Any]:
    """The document's content with its paths, which are relative to its folder, made absolute (`Path`)."""
    data = document.data
    for pattern in _PATHS.get(document.file.kind, {}):
        data = _changed(data, pattern, lambda value: _resolve(document, value))
    return dict(data)


def _check_path(document: Document, path: Place, value: str, kind: str) -> Iterator[Problem]:
    resolved = _resolve(document, value)
    if kind == "checkpoint":
        kind = "file" if Source(resolved).gguf else "folder"
    try:
        mode = resolved.stat().st_mode
    except OSError:  # not there, or a name longer than the file system takes
        mode = None
    if mode is None or not (stat.S_ISDIR(mode) if kind == "folder" else stat.S_ISREG(mode)):
        state = "not there" if mode is None else f"not a {kind}"
        yield document.problem(f"`{where(path)}` is `{show(value)}`, expected a {kind}; {resolved} is {state}", path)


def _resolve(document: Document, value: str) -> Path:
    return Path(os.path.realpath(document.file.path.parent / value))


def _find(data: Any, pattern: Place, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    if not pattern:
        yield path, data
    elif pattern[0] == "*":
        for key, item in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _find(item, pattern[1:], (*path, key))
    elif pattern[0] in data:
        yield from _find(data[pattern[0]], pattern[1:], (*path, pattern[0]))


def _changed(data: Any, pattern: Place, change: Callable[[Any], Any]) -> Any:
    if not pattern:
        return change(data)
    part, rest = pattern[0], pattern[1:]
    if part == "*":
        return [_changed(item, rest, change) for item in data]
    return {**data, part: _changed(data[part], rest, change)} if part in data else data
