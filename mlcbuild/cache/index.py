"""What was learned about files, by their stat: a memo that saves hashing and parsing, and that may vanish at any time.

Nothing depends on this file for correctness. Deleting or damaging `index.sqlite` costs the time to learn again; each
row carries a checksum, so that a damaged row is an unknown one. Every sqlite error is an unanswered question, not a
failure. (Last use, which garbage collection needs, is the modification time of the action entries themselves.)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mlcbuild.cache.disk import make_file, share

_T = TypeVar("_T")

_TABLE = (
    "create table if not exists memo (kind text not null, path text not null, stat text not null, "
    "value text not null, seal text not null, primary key (kind, path)) without rowid"
)
_COUNTS = (
    "create table if not exists counts (kind text not null, what text not null, number integer not null, "
    "primary key (kind, what)) without rowid"
)
_ADD = "insert into counts values (?, ?, ?) on conflict do update set number = number + excluded.number"
_SELECT = "select stat, value, seal from memo where kind = ? and path = ?"
_USED = 3600.0  # seconds
_PATIENCE = 2.0  # seconds to wait for another process's transaction


def signature(stat: os.stat_result) -> str:
    """What changes when a file's content does. ctime catches edits that put the old mtime back."""
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"


def note_use(entry: str | Path, status: os.stat_result, now: float) -> None:
    """An action's entry was used: its modification time says so, to the hour, so that an idle build writes nothing."""
    if now - status.st_mtime > _USED:
        with contextlib.suppress(OSError):  # a cache that is only read is fine
            os.utime(entry)


class Index:
    """The memo of one cache folder. Safe to use from several threads, processes and forks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0

    def get(self, kind: str, path: Path | str, stat: os.stat_result) -> str | None:
        """What was remembered about `path` when its stat was exactly this, or None."""
        key = (kind, str(path))
        row = self._ask(lambda connection: connection.execute(_SELECT, key).fetchone())
        if row is None or row[0] != signature(stat) or row[2] != _seal(*key, row[0], row[1]):
            return None
        value: str = row[1]
        return value

    def put(self, kind: str, path: Path | str, stat: os.stat_result, value: str) -> None:
        """Remember `value` until the file's stat changes."""
        row = (kind, str(path), signature(stat), value)
        self._ask(lambda connection: _write(connection, (*row, _seal(*row))))

    def add(self, kind: str, what: str, number: int) -> None:
        """Count something up."""
        self._ask(lambda connection: _count(connection, (kind, what, number)))

    def counts(self) -> dict[tuple[str, str], int]:
        """What was counted since the index was made: (kind, what) -> number."""
        rows = self._ask(lambda connection: connection.execute("select kind, what, number from counts").fetchall())
        return {(kind, what): number for kind, what, number in rows or ()}

    def close(self) -> None:
        """Close the file. The index opens again by itself when it is asked something."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    def _ask(self, question: Callable[[sqlite3.Connection], _T]) -> _T | None:
        """The answer, or None where sqlite has none to give; a damaged file is removed, to be made anew."""
        with self._lock:
            try:
                # A connection must not cross a fork: the child opens its own (and leaves the parent's alone).
                if self._connection is None or self._pid != os.getpid():
                    self._connection, self._pid = self._connect(), os.getpid()
                return question(self._connection)
            except sqlite3.OperationalError:
                return None  # locked, read-only, full disk: go without
            except sqlite3.Error:
                self._connection = None
                for suffix in ("", "-journal"):
                    Path(f"{self._path}{suffix}").unlink(missing_ok=True)
                return None

    def _connect(self) -> sqlite3.Connection:
        with contextlib.suppress(OSError):  # sqlite gives its journal the rights of this file
            make_file(self._path)
        connection = sqlite3.connect(self._path, timeout=_PATIENCE, check_same_thread=False)
        connection.execute("pragma synchronous = off")  # a memo needs no durability
        connection.execute(_TABLE)
        share(self._path)
        return connection


def _write(connection: sqlite3.Connection, row: tuple[str, ...]) -> None:
    with connection:
        connection.execute("insert or replace into memo values (?, ?, ?, ?, ?)", row)


def _count(connection: sqlite3.Connection, row: tuple[str, str, int]) -> None:
    with connection:
        connection.execute(_COUNTS)
        connection.execute(_ADD, row)


def _seal(kind: str, path: str, stat: str, value: str) -> str:
    return hashlib.sha256("\0".join((kind, path, stat, value)).encode("utf-8", "surrogateescape")).hexdigest()[:16]
