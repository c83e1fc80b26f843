"""Trees of files named by their content: what a step takes and what it makes; and JSON that can be digested."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.errors import MlcBuildError

_LONGEST, _DEEPEST = 255, 32  # bytes of a part of a name, parts
_PLAIN = re.compile(r"[\w-][\w.-]{0,199}", re.ASCII)  # what nearly all names are
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
_ODD = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True)
class Entry:
    """One file: its content's sha256 (hex), its size in bytes, its permission bits, and where that content lies."""

    digest: str
    size: int
    mode: int
    path: Path

    def to_json(self) -> list[Any]:
        return [self.digest, self.size, self.mode]


@dataclass(frozen=True)
class Tree:
    """Files by name. Names are relative, with `/`, and never climb (`check_name`)."""

    files: Mapping[str, Entry]

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def path(self, name: str) -> Path:
        """Where the file's content lies. Raises MlcBuildError when the tree has no such file."""
        if name not in self.files:
            raise MlcBuildError(f"{name}: no such file; there are: {', '.join(sorted(self.files)) or 'none'}")
        return self.files[name].path

    def read_json(self, name: str) -> Any:
        """The file's content as JSON. Raises MlcBuildError when it is absent or not JSON."""
        path = self.path(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise MlcBuildError(f"{name}: not valid JSON: {error}") from None

    @property
    def digest(self) -> str:
        """sha256 (hex) of names, contents and permission bits; where the files lie is not part of it."""
        return digest_json({name: entry.to_json() for name, entry in self.files.items()})

    def at(self, place: Callable[[str, int], Path | None]) -> Tree | None:
        """The same files where `place` finds them, by digest and size; None where it does not find one of them."""
        found = {}
        for name, entry in self.files.items():
            path = place(entry.digest, entry.size)
            if path is None:
                return None
            found[name] = Entry(entry.digest, entry.size, entry.mode, path)
        return Tree(found)

    def select(self, patterns: Sequence[str]) -> Tree:
        """The files whose name matches one of the shell patterns; all of them when there are no patterns."""
        if not patterns:
            return self
        return Tree({name: entry for name, entry in self.files.items() if matches(name, patterns)})


def canonical(value: Any) -> bytes:
    """JSON with exactly one spelling per value: sorted keys, no spaces, ASCII.

    Raises ValueError for NaN and infinities, TypeError for what JSON cannot hold.
    """
    return _CANONICAL.encode(value).encode()


def digest_json(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of `value`, the same on every machine."""
    return hashlib.sha256(canonical(value)).hexdigest()


def mode_of(stat: os.stat_result) -> int:
    """A file's permission bits as far as a tree keeps them: executable or not (as git does)."""
    return 0o755 if stat.st_mode & 0o100 else 0o644


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether `name` matches one of the shell patterns, upper and lower case told apart."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_name(name: str) -> str:
    """`name`, if it is a plain relative path that every file system can hold. Raises MlcBuildError when it is absolute,
    empty, climbs out, is no text, or is longer than names can be."""
    if _PLAIN.fullmatch(name):
        return name
    parts = name.split("/")
    try:
        plain = max(map(len, name.encode().split(b"/"))) <= _LONGEST and len(parts) <= _DEEPEST
    except UnicodeEncodeError:
        plain = False
    if not plain or not {"", ".", ".."}.isdisjoint(parts) or _ODD.search(name):
        raise MlcBuildError(
            f"{name[:100]!r}: not a plain relative file name (absolute, `..`, `\\`, control characters, empty parts, "
            f"and what is not UTF-8, are refused, and more than {_LONGEST} bytes or {_DEEPEST} folders)"
        )
    return name
