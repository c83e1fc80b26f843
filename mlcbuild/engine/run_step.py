"""One run of one step: its process, what it made, and the commit. Where its inputs come from is others' business."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlcbuild.cache.action import Action, Ingredients
from mlcbuild.cache.disk import full, room_in
from mlcbuild.cache.files import entry_of
from mlcbuild.cache.layout import LOGS
from mlcbuild.cache.locks import workplace
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Entry, Tree, check_name
from mlcbuild.engine import process
from mlcbuild.engine.code import declaration
from mlcbuild.engine.job import Places, Request
from mlcbuild.engine.process import StepBroke
from mlcbuild.errors import StepFailed
from mlcbuild.reporting.events import Report, StepNote, StepProgress

_EXCERPT = 40  # lines of a failed step's log that reports show
_NEARLY_FULL = 1 << 20  # bytes: a tool that fails on a disk with less free than this failed because of the disk


def run_step(request: Request, store: Store, report: Report, debug_dump: Path | None = None) -> Action:
    """Run the step and commit what it made. Raises StepFailed (StepBroke for a bug or a crash)."""
    started, ingredients, name = time.monotonic(), request.ingredients, request.name
    old = store.action(ingredients.key)
    with workplace(store.root) as place, room_in(store.root):
        places = make_places(place.path, store, debug_dump / name.replace(":", "/") if debug_dump else None)
        try:
            done = process.run(request, places, place, log_of(store, ingredients), _relay(name, report))
        except StepBroke as error:
            if shutil.disk_usage(store.root).free < _NEARLY_FULL:
                raise StepFailed(full(store.root)) from error
            raise
        _check_unchanged(request.given, store)
        # The process imported the code after the key was made; an edit in between must not go under that key.
        if declaration(request.module, store.index, request.entry).digest != ingredients.code:
            raise StepFailed("the code of the step was edited while it ran: build again")
        tree = _collect(places.output, done["reused"], request.given, store)
        action = Action.of(ingredients, name, round(time.monotonic() - started, 3), tree)
        store.commit(action)
    if old is not None and old.tree.digest != tree.digest:
        report(StepNote(name, "gave other bytes than the last time with the same inputs"))
    return action


def make_places(folder: Path, store: Store, debug_dump: Path | None = None) -> Places:
    """Fresh folders for a run under `folder`."""
    places = Places(folder / "output", folder / "scratch", store.root, debug_dump)
    places.output.mkdir()
    places.scratch.mkdir()
    if debug_dump is not None:
        debug_dump.mkdir(parents=True, exist_ok=True)
    return places


def log_of(store: Store, ingredients: Ingredients) -> Path:
    """Where the step's own output goes."""
    return store.root / LOGS / f"{ingredients.kind}-{ingredients.key[:16]}.log"


def tail(log: Path) -> str:
    """The last lines of a log; nothing where there is none."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_EXCERPT:])


def _relay(name: str, report: Report) -> Callable[[Mapping[str, Any]], None]:
    def relay(event: Mapping[str, Any]) -> None:
        if event["event"] == "note":
            report(StepNote(name, event["text"]))
        else:
            report(StepProgress(name, event["done"], event["total"], event["unit"]))

    return relay


def _check_unchanged(given: Iterable[Entry], store: Store) -> None:
    """Files could change while the step read them, those of the store through a link; by their stat they did not."""
    for entry in given:
        if entry_of(entry.path, store.index).digest != entry.digest:
            raise StepFailed(f"{entry.path}: changed while it was read: build again")


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
