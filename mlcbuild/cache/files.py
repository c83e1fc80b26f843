"""Digests of files that lie outside the store, remembered by stat."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from mlcbuild.cache.index import Index, signature
from mlcbuild.cache.tree import Entry, Tree, check_name, matches
from mlcbuild.errors import MlcBuildError
from mlcbuild.regular import nowhere, open_regular

# A write within the file system's clock tick leaves the stat as it was (ticks are 1 to 10 ms on Linux), so a file is
# hashed only when it has been left alone for longer than that.
_SETTLED = 0.02
_ATTEMPTS = 5
_BLOCK = 1 << 20  # bytes
AT_ONCE = min(8, os.cpu_count() or 1)  # files that are hashed
Progress = Callable[[int, int], None]  # is told bytes: how many of how many


def nobody(done: int, total: int) -> None:
    """A progress that nobody waits for."""


def counting(progress: Progress, entries: Iterable[Entry]) -> Callable[[int], None]:
    """A function, for several threads, that is told of bytes as they come and passes on how many of all that makes."""
    total, done, lock = sum(entry.size for entry in entries), 0, threading.Lock()

    def count(number: int) -> None:
        nonlocal done
        with lock:
            done += number
            progress(done, total)

    return count


_PLAIN = 0o644  # outside files count by content only: a chmod rebuilds nothing


def hash_file(path: Path, read: Callable[[int], None] = lambda count: None) -> str:
    """sha256 (hex) of the content; `read` is told, block by block, how many bytes have come."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open_regular(path) as file:
        while count := file.readinto(block):
            digest.update(block[:count])  # other threads run meanwhile
            read(count)
    return digest.hexdigest()


def digest_of(path: Path, index: Index | None) -> tuple[str, os.stat_result]:
    """The content's sha256, and the stat under which it was read.

    Raises MlcBuildError when the file keeps changing while it is read, OSError when it cannot be read.
    """
    for _ in range(_ATTEMPTS):
        before = path.stat()
        known = index.get("sha256", path, before) if index else None
        if known is not None:
            return known, before
        age = time.time() - max(before.st_mtime, before.st_ctime)
        if 0 <= age < _SETTLED:
            time.sleep(_SETTLED - age)
        digest = hash_file(path)
        after = path.stat()
        if signature(before) == signature(after):
            if index:
                index.put("sha256", path, after, digest)
            return digest, after
    raise MlcBuildError(f"{path}: changes while it is read: let its writer finish, then build again")


def entry_of(path: Path, index: Index | None) -> Entry:
    """The file as a tree's entry. Raises MlcBuildError when it is missing or unreadable."""
    try:
        digest, stat = digest_of(path, index)
    except OSError as error:
        raise MlcBuildError(f"{path}: cannot be read: {error.strerror}{nowhere(path)}") from None
    return Entry(digest, stat.st_size, _PLAIN, path)


def tree_of_folder(folder: Path, patterns: Sequence[str] = (), index: Index | None = None, deep: bool = True) -> Tree:
    """The folder's files (hidden ones left out) whose names match one of the patterns; `deep`: also of subfolders.

    Without `deep`, a subfolder is looked into where a pattern names it: `1_Pooling/config.json`.

    Raises MlcBuildError when the folder does not exist, a file cannot be read, or its name is not UTF-8; also for a
    link that leads nowhere and for what is no file (a pipe, a device): it is not as if there were no such file.
    """
    if not folder.is_dir():
        raise MlcBuildError(f"{folder}: no such folder")
    named = [pattern.partition("/")[0] for pattern in patterns if "/" in pattern]
    names = sorted(name for name in _names(folder, "", deep, named) if not patterns or matches(name, patterns))
    for name in names:
        if any("\ud800" <= character < "\ue000" for character in name):  # how Python holds bytes that are no text
            raise MlcBuildError(f"{folder}: the file name {os.fsencode(name)!r} is not UTF-8: rename the file")
    return Tree({check_name(name): entry_of(folder / name, index) for name in names})


def _names(folder: Path, prefix: str, deep: bool, named: Sequence[str] = ()) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # A link to a file is a file (Hugging Face's own cache is made of them); a linked folder could be a circle.
            if entry.is_dir(follow_symlinks=False):
                if deep or matches(entry.name, named):
                    yield from _names(folder / entry.name, f"{prefix}{entry.name}/", deep)
            elif not Path(entry.path).is_dir():
                yield f"{prefix}{entry.name}"
