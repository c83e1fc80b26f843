"""What a step is given, and where it puts what it makes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlcbuild.cache.layout import PARTIAL
from mlcbuild.cache.tree import Entry, Tree, check_name
from mlcbuild.errors import MlcBuildError

__all__ = ["Entry", "Job", "Tree", "from_request", "local_job"]

_PROGRESS_INTERVAL = 0.1  # seconds between two progress events: enough for a bar, too little to cost anything


class Job:
    """One run of one step, inside the step's own process.

    fields      exactly the recipe fields that the step declares (JSON)
    inputs      the declared inputs, by name
    materials   sha256 -> file: content that an input refers to by digest (not in the key, since the digest pins it)
    output      an empty folder: what is written here becomes the artifact
    scratch     a temporary folder, removed afterwards; also the working directory
    partial     where what has arrived of a long download is kept if the step fails; not there unless the step makes it
    debug_dump  where to write intermediate forms, when the user asked for them; never part of the artifact
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        inputs: Mapping[str, Tree],
        materials: Mapping[str, Path],
        output: Path,
        scratch: Path,
        debug_dump: Path | None = None,
        events: int | None = None,
        partial: Path | None = None,
    ) -> None:
        self.fields = fields
        self.inputs = inputs
        self.materials = materials
        self.output = output
        self.scratch = scratch
        self.debug_dump = debug_dump
        self.partial = partial or scratch / PARTIAL
        self.reused: dict[str, Entry] = {}
        self._events = events
        self._last_progress = 0.0

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


def from_request(request: Mapping[str, Any], events: int | None = None) -> Job:
    """The job that a request (see `mlcbuild.engine.process`) describes."""
    debug_dump = request["debug_dump"]
    return Job(
        fields=request["fields"],
        inputs={name: _tree(files) for name, files in request["inputs"].items()},
        materials={digest: Path(path) for digest, path in request["materials"].items()},
        output=Path(request["output"]),
        scratch=Path(request["scratch"]),
        debug_dump=Path(debug_dump) if debug_dump else None,
        events=events,
        partial=Path(request["cache"]) / PARTIAL,
    )


def _tree(files: Mapping[str, Any]) -> Tree:
    return Tree({name: Entry(digest, size, mode, Path(path)) for name, (digest, size, mode, path) in files.items()})


def local_job(
    inputs: Mapping[str, Path | Tree], fields: Mapping[str, Any], folder: Path, debug_dump: Path | None = None
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
    materials = {entry.digest: entry.path for tree in trees.values() for entry in tree.files.values()}
    output, scratch = folder / "output", folder / "scratch"
    output.mkdir(parents=True)
    scratch.mkdir(parents=True)
    return Job(fields, trees, materials, output, scratch, debug_dump)
