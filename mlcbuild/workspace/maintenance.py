"""`mlcbuild gc`, `pin`, `unpin` and `cache`: looking after a cache folder, said in text."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from mlcbuild.cache import audit as auditing
from mlcbuild.cache.gc import Plan, collect, only_one, parse_size, plan
from mlcbuild.cache.inventory import Stats, inventory, stats
from mlcbuild.cache.locks import running_since, sweep_dead
from mlcbuild.cache.pins import Hold, holds, installed, pin, pinned, unpin
from mlcbuild.cache.store import Store
from mlcbuild.errors import MlcBuildError
from mlcbuild.text import ago, amount
from mlcbuild.workspace.session import Session, growing

_KEEPERS = {"dist": "installed packages", "pin": "pins", "run": "running builds"}
_PROGRESS_EVERY = 0.5  # seconds


def gc(store: Store, dist: Path, max_size: str, dry_run: bool) -> tuple[str, bool]:
    """Collect garbage down to `max_size`; what was done, and whether that size was reached. Raises MlcBuildError."""
    limit = parse_size(max_size)
    with only_one(store.root), growing():
        if not dry_run:
            sweep_dead(store.root)
        now, since = time.time(), running_since(store.root)
        # What a test run installed in the cache itself holds nothing: it may go too.
        held = [hold for hold in holds(store.root) if not Path(hold.name).is_relative_to(store.root)]
        todo = plan(inventory(store.root), limit, [*held, *installed(dist)], since, now)
        freed = todo.before - todo.after if dry_run else collect(store.root, todo)
    return "".join(f"{line}\n" for line in _collected(todo, freed, limit, dry_run)), todo.reached


def pin_recipes(session: Session) -> list[str]:
    """Pin the selected recipes as they are built now. Raises MlcBuildError for one that is not built."""
    keys = {name: session.keys(name) for name in session.graph.goals} | dict.fromkeys(session.graph.unlocked)
    for name, found in keys.items():
        if found is None:
            raise MlcBuildError(f"{name} is not built, so there is nothing to pin: doit build recipe={name}")
    for name, found in keys.items():
        pin(session.store, session.root, name, found or ())
    return list(keys)


def unpin_recipes(store: Store, workspace: Path, names: str) -> list[str]:
    """Remove pins by names and globs, with commas; recipes that are no more included. Raises MlcBuildError."""
    known = sorted(pinned(store.root, workspace))
    found: list[str] = []
    for word in names.split(","):
        matching = [name for name in known if fnmatch(name, word.strip())] or [word.strip()]
        for name in matching:
            unpin(store, workspace, name)
        found += matching
    return found


def push(session: Session) -> tuple[int, int, list[str]]:
    """Put what the recipes are built from into the session's shared cache: how many were put there, how many it had,
    and what went wrong. Raises MlcBuildError for a recipe that is not built."""
    shared, problems = session.builder.shared, list[str]()
    put = had = 0
    for name in session.graph.unlocked:
        raise MlcBuildError(f"{name} is not built: doit build, then push")
    steps = session.graph.closure(name for goal in session.graph.goals.values() for name in goal.steps.values())
    for name in steps:
        action = session.lookup.find(name)
        if action is None and problems:
            continue  # it has content that was found damaged, or comes of what has
        if action is None:
            raise MlcBuildError(f"{name} is not built: doit build, then push")
        if shared is None or not shared.usable:
            break
        if shared.has(action.key, problems.append):
            had += 1
        else:
            put += shared.give(action, session.store, problems.append)
    return put, had, problems


def verify(store: Store) -> list[str]:
    """Check every blob, evict what is damaged; a line for each problem. Progress goes to a terminal's stderr."""
    shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if sys.stderr.isatty() and time.monotonic() - shown > _PROGRESS_EVERY:
            shown = time.monotonic()
            sys.stderr.write(f"\r{amount(done)} of {amount(total)} read ")

    return [str(problem) for problem in auditing.audit(store, progress)]


def figures(store: Store, dist: Path) -> str:
    """`mlcbuild cache stats`."""
    held: dict[str, Hold] = {}
    for hold in [*installed(dist), *holds(store.root)]:  # the record of a package knows more actions than its manifest
        held[f"{hold.reason} {hold.name}"] = hold
    return "".join(f"{line}\n" for line in _table(stats(inventory(store.root), held.values(), store.index.counts())))


def _collected(todo: Plan, freed: int, limit: int, dry_run: bool) -> Iterator[str]:
    if dry_run:
        for record in todo.records:
            yield f"would remove {record.name}, used {ago(record.used)}"
    kinds = Counter(record.step for record in todo.records)
    listed = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    actions = f"{len(todo.records)} actions{f' ({listed})' if listed else ''}"
    verb = "would free" if dry_run else "freed"
    left = todo.before - freed
    yield f"{verb} {amount(freed)}: {actions} and {len(todo.files)} files; {amount(left)} are left"
    for reason, size in sorted(todo.held.items()):
        yield f"held by {_KEEPERS[reason]}: {amount(size)}"
    if not todo.reached:
        yield f"{amount(limit)} cannot be reached: the rest is held (`mlcbuild unpin`, `doit clean` let go)"


def _table(found: Stats) -> Iterator[str]:
    yield f"{'step':12}{'actions':>9}{'size':>11}{'built':>8}{'fetched':>9}{'hits':>8}"
    for row in found.rows:
        counts = [row.counts.get(what, 0) for what in ("built", "fetched", "hits")]
        yield "{:12}{:9}{:>11}{:8}{:9}{:8}".format(row.kind, row.actions, amount(row.size), *counts)
    yield f"{found.actions} actions, {found.blobs} blobs of {amount(found.size)}; {amount(found.total)} in all"
    if found.unused:
        yield f"no action refers to {amount(found.unused)}: the next gc removes it"
    count, size = found.borrowed
    yield f"borrowed: {count} files outside the cache, {amount(size)}"
    for reason in ("dist", "pin"):
        number, size = found.held.get(reason, (0, 0))
        names = f" ({', '.join(found.pins)})" if reason == "pin" and number else ""
        yield f"{_KEEPERS[reason]}: {number}, {amount(size)}{names}"
