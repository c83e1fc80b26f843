"""Is every blob what its name says? Those that are not are removed, with the entries that need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlcbuild.cache.files import hash_file
from mlcbuild.cache.index import signature
from mlcbuild.cache.inventory import Blob, Inventory, inventory
from mlcbuild.cache.store import Store, borrowed_places, evict


@dataclass(frozen=True)
class Problem:
    """One thing that was wrong, and the steps (by name) that it takes along."""

    path: Path
    text: str
    steps: tuple[str, ...]

    def __str__(self) -> str:
        users = f"; runs again when needed: {', '.join(self.steps)}" if self.steps else ""
        return f"{self.path}: {self.text}{users}"


def audit(store: Store, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Problem]:
    """Read everything in the store, remove what is damaged, and say what that was.

    Entries whose blobs are gone are removed as well: they count as absent anyway. `progress` is told bytes.
    """
    found = inventory(store.root)
    users = _users(found)
    problems = [*_broken_files(found)]
    lost: set[str] = set()
    total, done = sum(blob.size for blob in found.blobs.values()), 0
    for digest, blob in found.blobs.items():
        text = _check_blob(digest, blob)
        if text is not None:
            lost.add(digest)
            problems.append(Problem(blob.path, text, users.get(digest, ())))
        done += blob.size
        progress(done, total)
    for digest, record in found.borrowed.items():
        places = borrowed_places(record.path)
        if not any(_still_holds(store, digest, path, stat) for path, stat in places):
            evict(record.path)
            lost.add(digest)
            where = ", ".join(path for path, _ in places) or "an unreadable record"
            text = f"borrowed from {where}, which is gone or has changed: forgotten"
            problems.append(Problem(record.path, text, () if digest in found.blobs else users.get(digest, ())))
    here = {digest for digest in found.blobs if digest not in lost}
    here |= {digest for digest, record in found.borrowed.items() if record.path.exists()}
    for action in found.records:
        missing = sorted(digest for digest in action.blobs if digest not in here)
        if missing and store.action(action.key) is None:  # asked again: a build may be writing right now
            store.forget(action.key)
            if not lost.intersection(missing):
                text = f"{len(missing)} of its {len(action.blobs)} files are not here: removed"
                problems.append(Problem(action.path, text, (action.name,)))
    return problems


def _broken_files(found: Inventory) -> Iterator[Problem]:
    for file in found.junk:
        kind = "a damaged entry" if file.path.suffix == ".json" else "not a file of the cache"
        yield Problem(file.path, f"{kind}: {evict(file.path)}", ())


def _check_blob(digest: str, blob: Blob) -> str | None:
    """What is wrong with the blob, after removing it; None when nothing is."""
    try:
        actual = hash_file(blob.path)
    except FileNotFoundError:
        return None  # collected meanwhile
    except PermissionError:
        return "cannot be read: permission denied; left alone"
    except OSError as error:
        return f"cannot be read: {error.strerror}: {evict(blob.path)}"
    if actual == digest:
        return None
    return f"damaged: its sha256 is {actual}: {evict(blob.path)}"


def _still_holds(store: Store, digest: str, path: str, recorded: str) -> bool:
    try:
        stat = Path(path).stat()
        if signature(stat) != recorded:
            return False
        actual = hash_file(Path(path))
    except PermissionError:
        return True  # another user's
    except OSError:
        return False
    if actual != digest:
        store.index.put("sha256", path, stat, actual)  # the same stat, other bytes: what was remembered is wrong
    return actual == digest


def _users(found: Inventory) -> Mapping[str, tuple[str, ...]]:
    users: dict[str, dict[str, None]] = {}
    for record in found.records:
        for digest in record.blobs:
            users.setdefault(digest, {})[record.name] = None
    return {digest: tuple(sorted(names)) for digest, names in users.items()}
