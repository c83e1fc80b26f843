"""What lies in a cache folder, by one walk through it, and figures of it by kind of step."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mlcbuild.cache import layout
from mlcbuild.cache.action import DIGEST, MOST_BYTES, Damaged, whole_record_of
from mlcbuild.cache.pins import Hold
from mlcbuild.regular import open_regular


class Record(NamedTuple):  # these two are made by the hundred thousand
    """An action's entry, as far as looking after the cache needs it."""

    key: str
    place: str  # its path
    step: str  # the kind
    name: str
    used: float  # seconds since 1970, to the hour
    size: int  # bytes of the entry's own file
    blobs: Mapping[str, int]  # digest -> size
    made: tuple[int, int] = (0, 0)  # inode, and when that was last changed (ns): another file has others

    @property
    def path(self) -> Path:
        return Path(self.place)


class Blob(NamedTuple):
    place: str  # its path
    size: int  # bytes on the disk; of a borrowed blob only its record lies here
    made: float  # when this file came here (a blob's modification time says nothing: it is always the same)

    @property
    def path(self) -> Path:
        return Path(self.place)


@dataclass(frozen=True)
class Inventory:
    records: tuple[Record, ...]
    blobs: Mapping[str, Blob]  # by digest
    borrowed: Mapping[str, Blob]  # by digest; `path` is the record's
    logs: tuple[Blob, ...]
    junk: tuple[Blob, ...]  # among entries and blobs, but nothing that the cache would read
    loose: tuple[Blob, ...] = ()  # worth keeping where there is room: test runs, unfinished downloads, compiled kernels

    @property
    def size(self) -> int:
        """Bytes of all that garbage collection looks after."""
        files = [*self.blobs.values(), *self.borrowed.values(), *self.logs, *self.junk, *self.loose]
        return sum(file.size for file in files) + sum(record.size for record in self.records)


@dataclass(frozen=True)
class Row:
    kind: str
    actions: int
    size: int  # bytes of the blobs that this kind's actions refer to, each once; kinds may share blobs
    counts: Mapping[str, int]  # built, fetched, hits: since the index was made


@dataclass(frozen=True)
class Stats:
    rows: tuple[Row, ...]
    actions: int
    blobs: int
    size: int  # bytes of all blobs, each once
    total: int  # bytes of the whole cache
    unused: int  # bytes of blobs that no action refers to
    borrowed: tuple[int, int]  # files that lie outside, and their bytes
    held: Mapping[str, tuple[int, int]]  # reason (dist, pin) -> how many holds, bytes of their blobs
    pins: tuple[str, ...]


def inventory(root: Path) -> Inventory:
    """Everything in the cache folder `root`. What vanishes meanwhile is not in it.

    Raises OSError where the disk does not say what there is.
    """
    records, blobs, borrowed, junk = [], {}, {}, []
    for file in _files(root / layout.ACTIONS):
        record = read_record(file.place)
        if record is None:
            junk.append(file)
        else:
            records.append(record)
    for file in _files(root / layout.BLOBS):
        *_, folder, name = file.place.rsplit(os.sep, 2)
        digest = name.removesuffix(layout.BORROWED)
        if not DIGEST.fullmatch(digest) or folder != digest[:2]:
            junk.append(file)
        elif digest != name:
            borrowed[digest] = file
        else:
            blobs[digest] = file
    loose = tuple(file for folder in layout.LOOSE for file in _files(root / folder))
    return Inventory(tuple(records), blobs, borrowed, tuple(_files(root / layout.LOGS)), tuple(junk), loose)


def read_record(path: str | Path) -> Record | None:
    """The entry at `path`; None when it is damaged or gone. Raises OSError where the disk does not say."""
    key = str(path).rpartition(os.sep)[2].removesuffix(".json")
    if not DIGEST.fullmatch(key):
        return None
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            text = file.readall() if status.st_size <= MOST_BYTES else b""
        entry = whole_record_of(text)
    except OSError as error:
        if not layout.is_absent(error):
            raise
        return None
    except Damaged:
        return None
    blobs = {digest: size for digest, size, _ in entry["files"].values()}
    made = (status.st_ino, status.st_ctime_ns)
    return Record(key, str(path), entry["step"], entry["name"], status.st_mtime, status.st_size, blobs, made)


def stats(found: Inventory, holds: Iterable[Hold], counts: Mapping[tuple[str, str], int]) -> Stats:
    """The figures of one cache."""
    kinds = sorted({record.step for record in found.records} | {kind for kind, _ in counts})
    sizes: dict[str, int] = {}
    for record in found.records:
        sizes.update(record.blobs)
    by_key = {record.key: record for record in found.records}
    held: dict[str, tuple[set[str], set[str]]] = {}
    pins = []
    for hold in holds:
        names, digests = held.setdefault(hold.reason, (set(), set()))
        names.add(hold.name)
        digests |= hold.blobs
        digests.update(digest for key in hold.keys if key in by_key for digest in by_key[key].blobs)
        if hold.reason == "pin":
            pins.append(hold.name)

    def here(digests: Iterable[str]) -> int:
        return sum(found.blobs[digest].size for digest in set(digests) if digest in found.blobs)

    def row(kind: str) -> Row:
        records = [record for record in found.records if record.step == kind]
        size = here(digest for record in records for digest in record.blobs)
        return Row(kind, len(records), size, {what: number for (of, what), number in counts.items() if of == kind})

    outside = [digest for digest in found.borrowed if digest not in found.blobs]
    return Stats(
        rows=tuple(row(kind) for kind in kinds),
        actions=len(found.records),
        blobs=len(found.blobs),
        size=here(found.blobs),
        total=found.size,
        unused=here(digest for digest in found.blobs if digest not in sizes),
        borrowed=(len(outside), sum(sizes.get(digest, 0) for digest in outside)),
        held={reason: (len(names), here(digests)) for reason, (names, digests) in held.items()},
        pins=tuple(sorted(pins)),
    )


def _files(folder: Path | str) -> Iterator[Blob]:
    """All plain files below. Of strings, and with one stat each: there may be a million."""
    for entry in sorted(layout.listed(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _files(entry.path)
        elif entry.is_file(follow_symlinks=False):
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError as error:
                if not layout.is_absent(error):
                    raise
                continue
            yield Blob(entry.path, status.st_size, status.st_ctime)
