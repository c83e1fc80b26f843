"""One step brought up to date: found in the cache, waited for, or run and committed."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.cache.code import declaration
from mlcbuild.cache.disk import full, room_in
from mlcbuild.cache.files import entry_of
from mlcbuild.cache.locks import Workplace, locked, workplace
from mlcbuild.cache.store import Action, Store, total_size
from mlcbuild.cache.tree import Entry, Tree, check_name
from mlcbuild.errors import MlcBuildError, StepFailed
from mlcbuild.execution import process
from mlcbuild.execution.lookup import Ingredients, Lookup
from mlcbuild.execution.process import StepBroke
from mlcbuild.execution.resources import Pool, needs
from mlcbuild.graph import Step
from mlcbuild.reporting.events import Report, StepFinished, StepNote, StepProgress, StepStarted, StepWaiting

if TYPE_CHECKING:
    from mlcbuild.execution.shared import SharedCache

_EXCERPT = 40  # lines of a failed step's log that reports show
_NEARLY_FULL = 1 << 20  # bytes: a tool that fails on a disk with less free than this failed because of the disk


@dataclass(frozen=True)
class Builder:
    """Builds steps of one graph into one store."""

    lookup: Lookup
    report: Report
    debug_dump: Path | None = None
    shared: SharedCache | None = None
    pool: Pool | None = None  # None: whoever calls takes care that not too much runs at once

    def build(self, name: str, force: bool = False) -> Action:
        """The step's action, after running whatever is missing; `force` runs this step even if it is not.

        Raises StepFailed (StepBroke for a bug or a crash); the text is for the user.
        """
        step = self.lookup.graph.steps[name]
        for producer in step.producers:
            self.build(producer)
        found = None if force else self.lookup.find(name)
        if found is not None:
            return found
        ingredients = self.lookup.ingredients(name)
        if ingredients is None:
            raise StepFailed(f"{name}: an input vanished from the cache while it was needed: build again")
        store, key = self.lookup.store, ingredients.key
        with (
            room_in(store.root),
            locked(store.root / "locks" / key, waiting=lambda: self.report(StepWaiting(name))),
        ):
            action = None if force else store.action(key)  # another process may have built it just now
            if action is None and not force:
                action = self._fetched(step, ingredients)
            elif action is not None:
                self.report(StepFinished(name, step.kind, "hit", 0.0, total_size(action.tree.files.values())))
            if action is None:
                with self._room(name):
                    action = self._timed(step, ingredients)
                store.index.add(step.kind, "built", 1)
                if self.shared is not None:
                    self.shared.give(action, store, lambda text: self.report(StepNote(name, text)))
        self.lookup.learn(name, action)
        return action

    def _room(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Hold what the step takes of this machine."""
        if self.pool is None:
            return contextlib.nullcontext()
        return self.pool.taken(needs(self.lookup.graph, name, self.pool.totals["cores"]))

    def _fetched(self, step: Step, ingredients: Ingredients) -> Action | None:
        """The action from the shared cache. What only refers to files of this machine is not asked for."""
        if self.shared is None or (step.inputs and not step.producers):
            return None
        started, store = time.monotonic(), self.lookup.store
        action = self.shared.fetch(ingredients, store, lambda text: self.report(StepNote(step.name, text)))
        if action is not None:
            size = total_size(action.tree.files.values())
            store.index.add(step.kind, "fetched", 1)
            self.report(StepNote(step.name, "from the shared cache"))
            self.report(StepFinished(step.name, step.kind, "hit", time.monotonic() - started, size))
        return action

    def _timed(self, step: Step, ingredients: Ingredients) -> Action:
        self.report(StepStarted(step.name, step.kind))
        started = time.monotonic()
        try:
            action = self._run(step, ingredients, started)
        except MlcBuildError as error:
            seconds = time.monotonic() - started
            log = _tail(_log(self.lookup.store, ingredients))
            self.report(StepFinished(step.name, step.kind, "failed", seconds, 0, str(error), log=log))
            broke = isinstance(error, StepBroke)
            raise (StepBroke if broke else StepFailed)(f"{step.name}: {error}") from None
        size = total_size(action.tree.files.values())
        self.report(StepFinished(step.name, step.kind, "built", action.seconds, size))
        return action

    def _run(self, step: Step, ingredients: Ingredients, started: float) -> Action:
        store = self.lookup.store
        materials = self._materials(step)
        log = _log(store, ingredients)
        old = store.action(ingredients.key)
        with workplace(store.root) as place, room_in(store.root):
            request = self._request(step, ingredients, materials, place)
            try:
                done = process.run(request, place, log, self._relay(step.name))
            except StepBroke as error:
                if shutil.disk_usage(store.root).free < _NEARLY_FULL:
                    raise StepFailed(full(store.root)) from error
                raise
            given = [*materials, *(entry for tree in ingredients.inputs.values() for entry in tree.files.values())]
            self._check_unchanged(given)
            # The process imported the code after the key was made; an edit in between must not go under that key.
            if declaration(step.module, store.index).digest != ingredients.code:
                raise StepFailed("the code of the step was edited while it ran: build again")
            tree = _collect(Path(request["output"]), done["reused"], given, store)
            action = Action(
                key=ingredients.key,
                step=step.kind,
                name=step.name,
                code=ingredients.code,
                fields=ingredients.fields,
                inputs={name: tree.digest for name, tree in ingredients.inputs.items()},
                toolchain=ingredients.toolchain,
                seconds=round(time.monotonic() - started, 3),
                tree=tree,
            )
            store.commit(action)
        if old is not None and old.tree.digest != tree.digest:
            self.report(StepNote(step.name, "gave other bytes than the last time with the same inputs"))
        return action

    def _materials(self, step: Step) -> list[Entry]:
        """The content that the step's inputs refer to by digest."""
        entries: list[Entry] = []
        for producer in step.materials:
            action = self.lookup.find(producer)
            if action is None:
                raise StepFailed(f"{producer}: vanished from the cache while it was needed: build again")
            entries += action.tree.files.values()
        return entries

    def _request(
        self, step: Step, ingredients: Ingredients, materials: Iterable[Entry], place: Workplace
    ) -> dict[str, Any]:
        output, scratch = place.path / "output", place.path / "scratch"
        output.mkdir()
        scratch.mkdir()
        debug_dump = self.debug_dump / step.name.replace(":", "/") if self.debug_dump else None
        if debug_dump is not None:
            debug_dump.mkdir(parents=True, exist_ok=True)
        return {
            "module": step.module,
            "fields": step.fields,
            "inputs": {
                name: {file: [*entry.to_json(), str(entry.path)] for file, entry in tree.files.items()}
                for name, tree in ingredients.inputs.items()
            },
            "materials": {entry.digest: str(entry.path) for entry in materials},
            "output": str(output),
            "scratch": str(scratch),
            "cache": str(self.lookup.store.root),
            "debug_dump": str(debug_dump) if debug_dump else None,
        }

    def _relay(self, name: str) -> Callable[[Mapping[str, Any]], None]:
        def relay(event: Mapping[str, Any]) -> None:
            if event["event"] == "note":
                self.report(StepNote(name, event["text"]))
            else:
                self.report(StepProgress(name, event["done"], event["total"], event["unit"]))

        return relay

    def _check_unchanged(self, given: Iterable[Entry]) -> None:
        """Files outside the store could change while the step read them; by their stat they did not."""
        store = self.lookup.store
        for entry in given:
            if not store.owns(entry.path) and entry_of(entry.path, store.index).digest != entry.digest:
                raise StepFailed(f"{entry.path}: changed while it was read: build again")


def _log(store: Store, ingredients: Ingredients) -> Path:
    """Where the step's own output goes."""
    return store.root / "logs" / f"{ingredients.kind}-{ingredients.key[:16]}.log"


def _tail(log: Path) -> str:
    """The last lines of a log; nothing where there is none."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_EXCERPT:])


def _collect(output: Path, reused: Mapping[str, Any], given: Iterable[Entry], store: Store) -> Tree:
    """The artifact: the files that the step wrote, moved into the store, and the inputs' files that it passes on.

    Raises StepBroke for anything but plain files with plain names, and for an empty artifact.
    """
    known = {entry.digest: entry for entry in given}
    files: dict[str, Entry] = {}
    for name, (digest, _, mode) in reused.items():
        if digest not in known:
            raise StepBroke(f"{name}: the step passes on content that none of its inputs has")
        entry = known[digest]
        if not store.owns(entry.path):
            store.borrow(entry)
        files[name] = Entry(digest, entry.size, mode, entry.path)
    for folder, folders, names in os.walk(output):
        for name in [*names, *folders]:
            path = Path(folder, name)
            relative = check_name(path.relative_to(output).as_posix())
            kind = path.lstat().st_mode
            if stat.S_ISREG(kind):
                with room_in(store.root, path.stat().st_size):
                    files[relative] = store.ingest(path)
            elif not stat.S_ISDIR(kind):
                raise StepBroke(f"{relative}: the step made something that is not a plain file")
    if not files:
        raise StepBroke("the step ended well but made nothing")
    return Tree(dict(sorted(files.items())))
