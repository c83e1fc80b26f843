"""One step on a worker of a cluster: inputs from the shared cache, the run, and its result back there.

What is not understood here is refused with a sentence, never guessed: a worker with other code or other tools would
make something else under the same key.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlcbuild.cache.disk import room_in
from mlcbuild.cache.files import entry_of
from mlcbuild.cache.layout import lock_path
from mlcbuild.cache.locks import locked
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Entry, Tree
from mlcbuild.engine.code import declaration
from mlcbuild.engine.lookup import Ingredients
from mlcbuild.engine.process import StepBroke
from mlcbuild.engine.run_step import attempt, log_of, tail
from mlcbuild.engine.shared import open_shared
from mlcbuild.engine.toolchain import toolchain
from mlcbuild.errors import MlcBuildError, StepFailed


def run_step(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run what `mlcbuild.engine.cluster` asks for: {"seconds"}, or {"failed", "broke", "log", "worker"}."""
    store = Store(_cache())
    ingredients = Ingredients(
        request["kind"],
        request["code"],
        request["fields"],
        {name: _tree(files) for name, files in request["inputs"].items()},
        request["toolchain"],
    )
    try:
        with room_in(store.root), locked(lock_path(store.root, ingredients.key)):
            return {"seconds": _run(request, ingredients, store)}
    except MlcBuildError as error:
        return {
            "failed": str(error),
            "broke": isinstance(error, StepBroke),
            "log": tail(log_of(store, ingredients)),
            "worker": socket.gethostname(),
        }


def _run(request: Mapping[str, Any], wanted: Ingredients, store: Store) -> float:
    said: list[str] = []
    shared = open_shared(request["remote"], True, request["patience"])
    _check_same(request, wanted, store)
    action = None if request["force"] else store.action(wanted.key)
    if action is None:
        inputs = {
            name: Tree({file: _here(entry, store, shared) for file, entry in tree.files.items()})
            for name, tree in wanted.inputs.items()
        }
        materials = [
            _here(Entry(digest, size, 0o644, Path(path)), store, shared)
            for digest, (size, path) in request["materials"].items()
        ]
        ingredients = Ingredients(wanted.kind, wanted.code, wanted.fields, inputs, wanted.toolchain)
        action = attempt(request["name"], request["module"], ingredients, materials, store, lambda event: None)
    if not shared.put(action, store, said.append):
        raise StepFailed("; ".join(said) or "the result could not be put into the shared cache")
    return action.seconds


def _check_same(request: Mapping[str, Any], wanted: Ingredients, store: Store) -> None:
    declared = declaration(request["module"], store.index)
    if declared.digest != wanted.code:
        raise StepFailed("the worker has another version of mlcbuild: install the same one everywhere")
    tools = toolchain(declared.tools)
    for name, version in wanted.toolchain.items():
        if tools.get(name) != version:
            raise StepFailed(f"the worker has {name} {tools.get(name)}, not {version}: install the same one everywhere")


def _here(entry: Entry, store: Store, shared: Any) -> Entry:
    """The content, in this machine's store, at its place if that is reached from here, or fetched."""
    found = store.find(entry.digest, entry.size)
    if found is not None:
        return Entry(entry.digest, entry.size, entry.mode, found)
    try:
        if entry.path.stat().st_size == entry.size and entry_of(entry.path, store.index).digest == entry.digest:
            return entry
    except (OSError, MlcBuildError):
        pass
    return Entry(entry.digest, entry.size, entry.mode, shared.bring(entry, store))


def _tree(files: Mapping[str, Any]) -> Tree:
    return Tree({name: Entry(digest, size, mode, Path(path)) for name, (digest, size, mode, path) in files.items()})


def _cache() -> Path:
    """MLCBUILD_CACHE of the worker, or a folder of its own on the worker's local disk."""
    named = os.environ.get("MLCBUILD_CACHE")
    if named:
        return Path(named).absolute()
    try:
        from distributed import get_worker

        return Path(get_worker().local_directory) / "mlcbuild-cache"
    except ValueError:  # called by hand
        return Path(tempfile.gettempdir()) / f"mlcbuild-{os.getuid()}"
