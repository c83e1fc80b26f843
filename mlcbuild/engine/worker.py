"""One step on a worker of a cluster: inputs from the shared cache, the run, and its result back there.

What is not understood here is refused with a sentence, never guessed: a worker with other code or other tools would
make something else under the same key.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlcbuild.cache.action import Damaged
from mlcbuild.cache.disk import room_in
from mlcbuild.cache.files import entry_of
from mlcbuild.cache.layout import lock_path
from mlcbuild.cache.locks import locked
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Entry, Tree
from mlcbuild.engine.code import declaration, toolchain
from mlcbuild.engine.job import Request
from mlcbuild.engine.process import StepBroke
from mlcbuild.engine.run_step import log_of, run_step, tail
from mlcbuild.engine.shared import SharedCache, open_shared
from mlcbuild.errors import MlcBuildError, StepFailed, plainly


def work(asked: Mapping[str, Any], remote: str, patience: float, force: bool) -> dict[str, Any]:
    """Run the request `asked` with the shared cache `remote`: {"seconds"}, or {"failed", "broke", "log", "worker"}."""
    store, request = Store(_cache()), Request.from_json(asked)
    try:
        with plainly(), room_in(store.root), locked(lock_path(store.root, request.ingredients.key)):
            return {"seconds": _run(request, open_shared(remote, True, patience), store, force)}
    except MlcBuildError as error:
        return {
            "failed": str(error),
            "broke": isinstance(error, StepBroke),
            "log": tail(log_of(store, request.ingredients)),
            "worker": socket.gethostname(),
        }


def _run(request: Request, shared: SharedCache, store: Store, force: bool) -> float:
    said: list[str] = []
    _check_same(request, store)
    action = None if force else store.action(request.ingredients.key)
    if action is None:
        inputs = {
            name: Tree({file: _here(entry, store, shared) for file, entry in tree.files.items()})
            for name, tree in request.ingredients.inputs.items()
        }
        ingredients = replace(request.ingredients, inputs=inputs)
        materials = tuple(_here(entry, store, shared) for entry in request.materials)
        action = run_step(replace(request, ingredients=ingredients, materials=materials), store, lambda event: None)
    if not shared.put(action, store, said.append):
        raise StepFailed("; ".join(said) or "the result could not be put into the shared cache")
    return action.seconds


def _check_same(request: Request, store: Store) -> None:
    declared = declaration(request.module, store.index, request.entry)
    if declared.digest != request.ingredients.code:
        raise StepFailed("the worker has another version of mlcbuild: install the same one everywhere")
    tools = toolchain(declared.tools)
    for name, version in request.ingredients.toolchain.items():
        if tools.get(name) != version:
            raise StepFailed(f"the worker has {name} {tools.get(name)}, not {version}: install the same one everywhere")


def _here(entry: Entry, store: Store, shared: SharedCache) -> Entry:
    """The content, in this machine's store, at its place if that is reached from here, or fetched."""
    found = store.find(entry.digest, entry.size)
    with contextlib.suppress(Damaged):
        if found is not None:
            here = Entry(entry.digest, entry.size, entry.mode, found)
            store.check([here])
            return here
    try:
        if entry.path.stat().st_size == entry.size and entry_of(entry.path, store.index).digest == entry.digest:
            return entry
    except (OSError, MlcBuildError):
        pass
    return Entry(entry.digest, entry.size, entry.mode, shared.bring(entry, store))


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
