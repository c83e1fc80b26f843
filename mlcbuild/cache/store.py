"""Blobs by digest, and actions by key: what was built once and need not be built again.

An action entry is written last and by one rename, after the content of every blob is on the disk: what can be read is
whole. An entry with a blob that is missing, of another size, or changed behind the store's back counts as absent.
By size and time that is, which saves work; what goes into a package, to a hub, or to a shared cache is read and hashed
(`prove`), and what a step is given is hashed if its stat has changed since that was done (`check`).
Where what lies is said by `mlcbuild.cache.layout`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlcbuild.cache import layout
from mlcbuild.cache.action import Action, Damaged, record_of
from mlcbuild.cache.disk import make_folder, share
from mlcbuild.cache.files import AT_ONCE, digest_of, hash_file
from mlcbuild.cache.index import Index, note_use, signature
from mlcbuild.cache.locks import workplace
from mlcbuild.cache.materialise import BLOB_MODE, BLOB_TIME
from mlcbuild.cache.tree import Entry, canonical, mode_of
from mlcbuild.errors import MlcBuildError
from mlcbuild.regular import read_regular

_PLACES = 8  # that a borrowed blob is remembered at


class Store:
    """One cache folder. Several processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.index = Index(root / layout.INDEX)
        self._hits: dict[str, str] = {}  # key -> kind of step

    # Blobs

    def blob_path(self, digest: str) -> Path:
        return self.root / layout.blob_name(digest)

    def find(self, digest: str, size: int) -> Path | None:
        """Where the content with this digest lies, or None when it is gone or no longer that content."""
        path = self.blob_path(digest)
        try:
            stat = path.stat()
        except OSError:
            return self._find_borrowed(path, size)
        if stat.st_size == size and stat.st_mtime == BLOB_TIME:
            return path
        # Somebody wrote to it, perhaps through a hard link in dist/: believe nothing but the content. Or whoever asks
        # is wrong about its size, which is no reason to lose it.
        with contextlib.suppress(OSError):  # another user's: it is hashed again the next time
            if hash_file(path) != digest:
                path.unlink()
            else:
                with contextlib.suppress(PermissionError):
                    os.utime(path, (BLOB_TIME, BLOB_TIME))
                if stat.st_size == size:
                    return path
        return self._find_borrowed(path, size)

    def prove(self, entries: Iterable[Entry], read: Callable[[int], None] = lambda count: None) -> None:
        """Read and hash the content of all; `read` is told of bytes. What is damaged is removed from the store.

        Raises Damaged, with a line for each of these.
        """
        unique = {entry.digest: entry for entry in entries}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            wrong = filter(None, pool.map(lambda entry: self._prove(entry, read), unique.values()))
            if said := list(wrong):
                raise Damaged("\n".join(said))

    def check(self, entries: Iterable[Entry]) -> None:
        """As `prove`, but what was hashed before is read again only where its stat, ctime included, has changed."""
        said = list[str]()
        for entry in {entry.digest: entry for entry in entries}.values():
            try:
                digest, _ = digest_of(entry.path, self.index)
            except OSError as error:
                said.append(self._lost(entry, error))
                continue
            if digest != entry.digest:
                said.append(self.discard(entry, digest))
        if said:
            raise Damaged("\n".join(said))

    def discard(self, entry: Entry, actual: str) -> str:
        """Forget content that was found to be something else, so that nobody uses it and what made it runs again.

        A sentence about it.
        """
        words = f"{entry.path}: damaged: its sha256 is {actual[:16]}…, not {entry.digest[:16]}…"
        if self.owns(entry.path):
            return f"{words}: {evict(entry.path)}"
        with contextlib.suppress(OSError):
            self.index.put("sha256", entry.path, entry.path.stat(), actual)  # the same stat, and other bytes
        return f"{words}: {evict(self._borrowed_path(entry.digest))}, as far as the cache knew of it"

    def _prove(self, entry: Entry, read: Callable[[int], None]) -> str | None:
        try:
            actual = hash_file(entry.path, read)
        except OSError as error:
            return self._lost(entry, error)
        return None if actual == entry.digest else self.discard(entry, actual)

    def _lost(self, entry: Entry, error: OSError) -> str:
        """What is said of content that is gone, or that the disk does not give back, which is forgotten. Raises the
        error where it is about something else."""
        if isinstance(error, FileNotFoundError):
            return f"{entry.path}: it is gone"
        if error.errno != errno.EIO or not self.owns(entry.path):
            raise error
        return f"{entry.path}: cannot be read: {error.strerror}: {evict(entry.path)}"

    def ingest(self, file: Path, expected: str | None = None) -> Entry:
        """Move a file into the store, durably. `file` must be on the store's file system, and is gone afterwards.

        Raises Damaged, and leaves the file where it is, when its digest is not the `expected` one.
        """
        stat, digest = file.stat(), hash_file(file)
        if expected not in (None, digest):
            raise Damaged(f"its sha256 is {digest}, not {expected}")
        with file.open("rb") as content:
            os.fsync(content.fileno())
        path = self.blob_path(digest)
        make_folder(path.parent)
        file.chmod(BLOB_MODE)
        os.utime(file, (BLOB_TIME, BLOB_TIME))
        file.replace(path)
        self.index.put("sha256", path, path.stat(), digest)
        return Entry(digest, stat.st_size, mode_of(stat), path)

    def borrow(self, entry: Entry) -> None:
        """Record that the entry's file, outside the store, holds its content. Nothing is copied.

        Raises MlcBuildError when the file no longer holds it.
        """
        try:
            digest, stat = digest_of(entry.path, self.index)
        except OSError as error:
            raise MlcBuildError(f"{entry.path}: cannot be read: {error.strerror}") from None
        if digest != entry.digest:
            raise MlcBuildError(f"{entry.path}: changed during the build: build again")
        record = self._borrowed_path(entry.digest)
        # Several users of one cache have files of this content each.
        others = [place for place in borrowed_places(record) if place[0] != str(entry.path)]
        places = [[str(entry.path), signature(stat)], *others[: _PLACES - 1]]
        self.write(record, canonical({"places": places}))

    def owns(self, path: Path) -> bool:
        """Whether `path` is a blob: other files that lie in the cache's folder may change or go."""
        return path.is_relative_to(self.root / layout.BLOBS)

    def _borrowed_path(self, digest: str) -> Path:
        return self.root / layout.borrowed_name(digest)

    def _find_borrowed(self, blob: Path, size: int) -> Path | None:
        for path, recorded in borrowed_places(self._borrowed_path(blob.name)):
            with contextlib.suppress(OSError):
                stat = Path(path).stat()
                if stat.st_size == size and signature(stat) == recorded:
                    return Path(path)
        return None

    # Actions

    def action(self, key: str) -> Action | None:
        """The action with this key, if all of its artifact is here."""
        path = self._action_path(key)
        action = self._read(path)
        if action is not None:
            self._touch(path)
        return action

    def count_hit(self, action: Action) -> None:
        """The action was found. Each counts once a run, when a build is over (`save_counts`)."""
        self._hits.setdefault(action.key, action.step)

    def save_counts(self) -> None:
        """Add this run's hits to those of all runs, for `mlcbuild cache stats`."""
        for step, count in Counter(self._hits.values()).items():
            self.index.add(step, "hits", count)
        self._hits.clear()

    def commit(self, action: Action) -> None:
        """Make the action known. Its blobs must be in the store already."""
        for folder in {self.blob_path(entry.digest).parent for entry in action.tree.files.values()}:
            _sync_folder(folder)
        _sync_folder(self.root / layout.BLOBS)
        self.write(self._action_path(action.key), action.to_json())

    def forget(self, key: str) -> bool:
        """Remove the action's entry; whether there was one. Its blobs stay, for whoever else refers to them."""
        try:
            self._action_path(key).unlink()
        except FileNotFoundError:
            return False
        return True

    def recorded(self, step: str) -> Iterator[dict[str, Any]]:
        """Every readable entry of one kind of step as it was written, the least recently used first.

        Each has its `key` added; whether its blobs are still here is not looked at.
        """
        for path in sorted(layout.action_files(self.root), key=_modified):
            try:
                record = record_of(read_regular(path))
            except (OSError, Damaged):
                continue
            if record["step"] == step:
                yield {**record, "key": path.stem}

    def _action_path(self, key: str) -> Path:
        return self.root / layout.action_name(key)

    def _read(self, path: Path) -> Action | None:
        try:
            action = Action.from_json(path.stem, read_regular(path))
        except (OSError, Damaged):
            return None  # an entry that was damaged on the disk is an entry that is not there
        tree = action.tree.at(self.find)
        return dataclasses.replace(action, tree=tree) if tree is not None else None

    def _touch(self, path: Path) -> None:
        with contextlib.suppress(OSError):  # it has just gone
            note_use(path, path.stat(), time.time())

    def write(self, path: Path, content: bytes) -> None:
        """Write a small file so that it is either absent (or the old one) or whole."""
        make_folder(path.parent)
        with workplace(self.root) as place:
            temporary = place.path / path.name
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            share(temporary)  # other users note their use of it by its modification time
            temporary.replace(path)
        _sync_folder(path.parent)


def borrowed_places(record: Path) -> list[tuple[str, str]]:
    """Where a borrowed blob lies, by its record: paths, and the stat that each had."""
    try:
        return [(str(path), str(stat)) for path, stat in json.loads(read_regular(record))["places"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def evict(path: Path) -> str:
    """Remove a damaged blob, or a record; what came of that.

    A hard link in dist/ is the same file, with the same damage. With another time than it was installed with it is not
    believed any more, and the next build installs the package again.
    """
    try:
        if path.stat().st_mtime == BLOB_TIME:
            os.utime(path)
    except OSError:
        pass
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return f"cannot be removed: {error.strerror}"
    return "removed"


def total_size(entries: Iterable[Entry]) -> int:
    """Bytes of all entries together."""
    return sum(entry.size for entry in entries)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
