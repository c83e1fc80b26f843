"""One run of a step: the request for it, and what the step is given and where it puts what it makes."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.cache.action import Ingredients
from mlcbuild.cache.layout import PARTIAL
from mlcbuild.cache.tree import Entry, Tree, check_name
from mlcbuild.errors import MlcBuildError

__all__ = ["Entry", "Job", "Places", "Request", "Tree", "local_job"]

_PROGRESS_INTERVAL = 0.1  # seconds between two progress events: enough for a bar, too little to cost anything


@dataclass(frozen=True)
class Request:
    """What is to be run, on whatever machine. `materials` is content that the inputs refer to by digest."""

    name: str  # the task's
    module: str
    entry: str
    ingredients: Ingredients
    materials: tuple[Entry, ...] = ()
    memory: int = 0  # bytes of its own that it may take before it is stopped; 0: any number

    @property
    def given(self) -> list[Entry]:
        """All files that the step is given."""
        inputs = self.ingredients.inputs.values()
        return [*self.materials, *(entry for tree in inputs for entry in tree.files.values())]

    def to_json(self) -> dict[str, Any]:
        """Each file is a list: digest, size, mode, and its place on this machine."""
        inputs = self.ingredients.inputs
        return {
            **vars(self),
            "ingredients": {
                **{name: getattr(self.ingredients, name) for name in ("kind", "code", "fields")},
                "toolchain": dict(self.ingredients.toolchain),
                "inputs": {
                    name: {file: _file(entry) for file, entry in tree.files.items()} for name, tree in inputs.items()
                },
            },
            "materials": [_file(entry) for entry in self.materials],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Request:
        made_of = record["ingredients"]
        inputs = {
            name: Tree({file: _entry(*each) for file, each in files.items()})
            for name, files in made_of["inputs"].items()
        }
        materials = tuple(_entry(*each) for each in record["materials"])
        ingredients = Ingredients(**{**made_of, "inputs": inputs})
        return cls(**{**record, "ingredients": ingredients, "materials": materials})


@dataclass(frozen=True)
class Places:
    """Where a run happens on this machine; all absolute."""

    output: Path
    scratch: Path
    cache: Path
    debug_dump: Path | None = None

    def to_json(self) -> dict[str, str | None]:
        return {name: None if path is None else str(path) for name, path in vars(self).items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Places:
        output, scratch, cache = (Path(record[name]) for name in ("output", "scratch", "cache"))
        return cls(output, scratch, cache, Path(record["debug_dump"]) if record["debug_dump"] else None)


class Job:
    """One run of one step, inside the step's own process.

    fields      exactly the recipe fields that the step declares (JSON)
    inputs      the declared inputs, by name
    materials   sha256 -> file: content that an input refers to by digest (not in the key, since the digest pins it)
    output      an empty folder: what is written here becomes the artifact
    scratch     a temporary folder, removed afterwards; also the working directory
    partial     where what has arrived of a long download is kept if the step fails; not there unless the step makes it
    debug_dump  where to write intermediate forms, when the user asked for them; never part of the artifact
    has_entry   whether the planner chose a function of a backend for this step
    """

    def __init__(self, request: Request, places: Places, events: int | None = None) -> None:
        self.fields = request.ingredients.fields
        self.inputs = request.ingredients.inputs
        self.materials = {entry.digest: entry.path for entry in request.materials}
        self.output = places.output
        self.scratch = places.scratch
        self.debug_dump = places.debug_dump
        self.partial = places.cache / PARTIAL
        self.reused: dict[str, Entry] = {}
        self.has_entry = bool(request.entry)
        self._entry = request.entry
        self._events = events
        self._last_progress = 0.0

    @property
    def entry(self) -> Callable[..., Any]:
        """The function that the planner chose; its module is imported here."""
        module, _, name = self._entry.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function

    def progress(self, done: int, total: int, unit: str = "bytes") -> None:
        """Tell the user how far the step is. Cheap enough to call for every tensor."""
        now = time.monotonic()
        if done < total and now - self._last_progress < _PROGRESS_INTERVAL:
            return
        self._last_progress = now
        self.send({"event": "progress", "done": done, "total": total, "unit": unit})

    def note(self, text: str) -> None:
        """One line for the user and the log."""
        self.send({"event": "note", "text": text})

    def reuse(self, entry: Entry, name: str) -> None:
        """The artifact contains, at `name`, the content of an input's file: nothing is copied."""
        self.reused[check_name(name)] = entry

    def folder(self, tree: Tree, where: Path) -> Path:
        """`where`, filled with symbolic links to the tree's files, for tools that want a folder."""
        for name, entry in tree.files.items():
            link = where / check_name(name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(entry.path)
        return where

    def send(self, event: Mapping[str, Any]) -> None:
        """One JSON line to the parent process; nowhere when the job was made by hand (tests)."""
        if self._events is not None:
            os.write(self._events, json.dumps(event).encode() + b"\n")


def local_job(
    inputs: Mapping[str, Path | Tree],
    fields: Mapping[str, Any],
    folder: Path,
    debug_dump: Path | None = None,
    entry: str = "",
) -> Job:
    """A job outside the cache, for trying a step by hand and for tests: inputs may be folders.

    Every file of every input is also a material. Output and scratch are made under `folder`. Raises MlcBuildError
    when an input folder does not exist.
    """
    from mlcbuild.cache.files import tree_of_folder

    trees: dict[str, Tree] = {}
    for name, value in inputs.items():
        if isinstance(value, Path) and not value.is_dir():
            raise MlcBuildError(f"{value}: no such folder")
        trees[name] = tree_of_folder(value) if isinstance(value, Path) else value
    materials = tuple(entry for tree in trees.values() for entry in tree.files.values())
    places = Places(folder / "output", folder / "scratch", folder / "scratch", debug_dump)
    places.output.mkdir(parents=True)
    places.scratch.mkdir(parents=True)
    return Job(Request("", "", entry, Ingredients("", "", fields, trees, {}), materials), places)


def _file(entry: Entry) -> list[Any]:
    return [*entry.to_json(), str(entry.path)]


def _entry(digest: str, size: int, mode: int, path: str) -> Entry:
    return Entry(digest, size, mode, Path(path))
