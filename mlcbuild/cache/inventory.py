"""What lies in a cache folder, by one walk through it."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlcbuild.cache import layout
from mlcbuild.cache.action import DIGEST, Action, Damaged


@dataclass(frozen=True)
class Record:
    """An action's entry, as far as looking after the cache needs it."""

    key: str
    path: Path
    step: str  # the kind
    name: str
    used: float  # seconds since 1970, to the hour
    size: int  # bytes of the entry's own file
    blobs: Mapping[str, int]  # digest -> size


@dataclass(frozen=True)
class Blob:
    path: Path
    size: int  # bytes on the disk; of a borrowed blob only its record lies here
    made: float  # when this file came here (a blob's modification time says nothing: it is always the same)


@dataclass(frozen=True)
class Inventory:
    records: tuple[Record, ...]
    blobs: Mapping[str, Blob]  # by digest
    borrowed: Mapping[str, Blob]  # by digest; `path` is the record's
    logs: tuple[Blob, ...]
    junk: tuple[Blob, ...]  # among entries and blobs, but nothing that the cache would read
    loose: tuple[Blob, ...] = ()  # test runs and unfinished downloads: worth keeping only where there is room

    @property
    def size(self) -> int:
        """Bytes of all that garbage collection looks after."""
        files = [*self.blobs.values(), *self.borrowed.values(), *self.logs, *self.junk, *self.loose]
        return sum(file.size for file in files) + sum(record.size for record in self.records)


def inventory(root: Path) -> Inventory:
    """Everything in the cache folder `root`. What vanishes meanwhile is not in it."""
    records, blobs, borrowed, junk = [], {}, {}, []
    for file in _files(root / layout.ACTIONS):
        record = read_record(file.path)
        if record is None:
            junk.append(file)
        else:
            records.append(record)
    for file in _files(root / layout.BLOBS):
        digest, dot, ending = file.path.name.partition(".")
        if (
            not DIGEST.fullmatch(digest)
            or file.path.parent.name != digest[:2]
            or (dot and f".{ending}" != layout.BORROWED)
        ):
            junk.append(file)
        elif dot:
            borrowed[digest] = file
        else:
            blobs[digest] = file
    loose = tuple(file for folder in layout.LOOSE for file in _files(root / folder))
    return Inventory(tuple(records), blobs, borrowed, tuple(_files(root / layout.LOGS)), tuple(junk), loose)


def read_record(path: Path) -> Record | None:
    """The entry at `path`; None when it is damaged or gone."""
    try:
        status = path.stat()
        action = Action.from_json(path.stem, path.read_bytes())
    except (OSError, Damaged):
        return None
    if not DIGEST.fullmatch(action.key):
        return None
    blobs = {entry.digest: entry.size for entry in action.tree.files.values()}
    return Record(action.key, path, action.step, action.name, status.st_mtime, status.st_size, blobs)


def _files(folder: Path) -> Iterator[Blob]:
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(parent, name)
            with contextlib.suppress(OSError):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    yield Blob(path, status.st_size, status.st_ctime)
