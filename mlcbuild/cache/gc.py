"""Garbage collection: least recently used actions go, and blobs that no action refers to, down to a size.

First the plan, from an inventory, then the deed. Entries go before their blobs, so that whatever stops it, what can
still be read is whole. A build that begins meanwhile loses nothing that it has found: it notes its use of an entry by
the entry's time, and that is looked at again just before the entry goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlcbuild.cache import layout
from mlcbuild.cache.inventory import Blob, Inventory, Record, read_record
from mlcbuild.cache.pins import Hold
from mlcbuild.errors import MlcBuildError

_SLACK = 2 * 3600.0  # seconds: last use is kept to the hour
_LOGS = 14 * 86400.0  # seconds that a step's output, a test run and an unfinished download are kept
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Plan:
    """What would go, and what it would leave."""

    began: float  # when the inventory was taken
    records: tuple[Record, ...]
    files: tuple[Blob, ...]  # blobs, old logs, junk, test runs and unfinished downloads
    before: int  # bytes
    after: int
    held: dict[str, int]  # reason (dist, pin, run) -> bytes of blobs that stay for it
    reached: bool
    known: Mapping[str, Record]  # all entries that were read for it, by path: not to read them twice


def plan(found: Inventory, limit: int, holds: Iterable[Hold], running_since: float | None, now: float) -> Plan:
    """What has to go for the cache to have at most `limit` bytes; what nothing refers to goes in any case.

    Never goes: what a hold has, what was used or made since the oldest running build began.
    """
    keys: dict[str, str] = {}
    kept: dict[str, str] = {}  # digest -> reason
    for hold in holds:
        keys.update(dict.fromkeys(hold.keys, hold.reason))
        kept.update(dict.fromkeys(hold.blobs, hold.reason))
    busy = running_since if running_since is not None else float("inf")
    for record in found.records:
        reason = keys.get(record.key) or ("run" if record.used >= busy - _SLACK else None)
        if reason is not None:
            keys[record.key] = reason
            for digest in record.blobs:
                kept.setdefault(digest, reason)
    references = Counter(digest for record in found.records for digest in record.blobs)

    def files(digest: str) -> list[Blob]:
        every = (found.blobs.get(digest), found.borrowed.get(digest))
        return [file for file in every if file is not None and digest not in kept and file.made < busy]

    going = [file for file in found.junk if file.made < busy]
    going += [file for file in found.logs if file.made < min(busy, now - _LOGS)]
    for digest in {**found.blobs, **found.borrowed}:
        if not references[digest]:
            going += files(digest)
    size = found.size - sum(file.size for file in going)
    for file in sorted(found.loose, key=lambda file: (file.made, file.place)):
        if file.made < min(busy, now - _LOGS) or (size > limit and file.made < busy):
            going.append(file)
            size -= file.size
    records: list[Record] = []
    for record in sorted(found.records, key=lambda record: (record.used, record.key)):
        if size <= limit:
            break
        if record.key in keys or (record.blobs and all(digest in kept for digest in record.blobs)):
            continue
        records.append(record)
        size -= record.size
        for digest in record.blobs:
            references[digest] -= 1
            if not references[digest]:
                gone = files(digest)
                going += gone
                size -= sum(file.size for file in gone)
    held = Counter[str]()
    for digest, reason in kept.items():
        if digest in found.blobs:
            held[reason] += found.blobs[digest].size
    known = {record.place: record for record in found.records}
    return Plan(now, tuple(records), tuple(going), found.size, size, dict(held), size <= limit, known)


def collect(root: Path, todo: Plan) -> int:
    """Do it; the bytes that were freed. What was used or made again since the plan stays.

    Raises OSError, before any blob goes, where it cannot be known which are needed.
    """
    freed = 0
    for record in todo.records:
        with contextlib.suppress(OSError):
            if record.path.stat().st_mtime == record.used:
                record.path.unlink()
                freed += record.size
    needed = _needed(root, todo.known)
    for file in todo.files:
        with contextlib.suppress(OSError):
            digest = file.place.rpartition(os.sep)[2].partition(".")[0]
            if digest not in needed and file.path.stat().st_ctime == file.made:
                file.path.unlink()
                freed += file.size
    for top in (root / name for name in layout.LOOSE):
        below = [file.path for file in todo.files if file.place.startswith(f"{top}{os.sep}")]
        emptied = {parent for path in below for parent in path.parents}
        for folder in sorted((each for each in emptied if top in each.parents), reverse=True):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
    return freed


@contextlib.contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Hold the cache against other collections. The lock is on the folder: a full disk has no room for another file.

    Raises MlcBuildError when another process collects.
    """
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise MlcBuildError(f"{root}: another process is collecting garbage here: let it finish") from None
    finally:
        os.close(descriptor)


def parse_size(text: str) -> int:
    """`20G`, `500MB`, `1.5TiB`, `0` in bytes. K, M, G, T are powers of 1000, Ki, Mi, Gi, Ti of 1024.

    Raises MlcBuildError.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS:
        raise MlcBuildError(f"{text!r} is not a size: expected a number with K, M, G, T (or Ki, Mi, Gi, Ti), like 20G")
    return int(float(match[1]) * _UNITS[match[2]])


def _needed(root: Path, known: Mapping[str, Record]) -> set[str]:
    """Digests that entries refer to now. Those that came since the plan, or were written again, are read.

    Raises OSError where that cannot be known.
    """
    needed: set[str] = set()
    for entry in layout.action_entries(root):
        record = known.get(entry.path)
        try:
            status = entry.stat()
            if record is None or record.made != (status.st_ino, status.st_ctime_ns):
                record = read_record(Path(entry.path))
        except OSError as error:
            if not layout.is_absent(error):
                raise
        if record is not None:
            needed.update(record.blobs)
    return needed
