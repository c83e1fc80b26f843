"""What one run of a step depends on, and what came of it: keys, and the text of entries."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlcbuild.cache.tree import Entry, Tree, check_name, digest_json
from mlcbuild.errors import MlcBuildError

DIGEST = re.compile(r"[0-9a-f]{64}")
MOST_BYTES = 16 << 20  # of an entry
_MODES = (0o644, 0o755)
_MOST_FILES, _LARGEST = 50_000, 1 << 44  # of an artifact; bytes of one file
_LONGEST = 1000  # characters of a name
_LONGEST_RUN = 1e10  # seconds: an integer of JSON may be larger than any float
_TEXTS, _OBJECTS = ("tree", "step", "name", "code"), ("files", "fields", "inputs", "toolchain")
_NOWHERE = Path()


class Damaged(MlcBuildError):
    """Content is not what its digest says, or an entry is not whole."""


@dataclass(frozen=True)
class Ingredients:
    """Everything that a step's result depends on."""

    kind: str
    code: str
    fields: Mapping[str, Any]
    inputs: Mapping[str, Tree]
    toolchain: Mapping[str, str]

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """Input name -> tree digest."""
        return {name: tree.digest for name, tree in self.inputs.items()}

    @cached_property
    def key(self) -> str:
        return _key(self.kind, self.code, self.fields, self.digests, self.toolchain)


@dataclass(frozen=True)
class Action:
    """What went into one run of a step, and the artifact that came out."""

    key: str
    step: str  # the kind: convert, quantize ...
    name: str  # the task's name when it ran; in no key
    code: str
    fields: Mapping[str, Any]
    inputs: Mapping[str, str]  # input name -> tree digest
    toolchain: Mapping[str, str]
    seconds: float
    tree: Tree

    @classmethod
    def of(cls, ingredients: Ingredients, name: str, seconds: float, tree: Tree) -> Action:
        """What came of one run of the step called `name`."""
        made = ingredients
        return cls(made.key, made.kind, name, made.code, made.fields, made.digests, made.toolchain, seconds, tree)

    @classmethod
    def from_json(cls, key: str, text: bytes) -> Action:
        """The action that an entry describes; where its files lie is not known yet (`Tree.at`).

        Raises Damaged for an entry that is not whole.
        """
        record = whole_record_of(text)
        given = {name: record[name] for name in ("step", "name", "code", "fields", "inputs", "toolchain")}
        files = {name: Entry(digest, size, mode, _NOWHERE) for name, (digest, size, mode) in record["files"].items()}
        return cls(key=key, **given, seconds=float(record["seconds"]), tree=Tree(files))

    def to_json(self) -> bytes:
        """The text of its entry."""
        files = {name: entry.to_json() for name, entry in self.tree.files.items()}
        record = {**vars(self), "tree": self.tree.digest, "files": files}
        del record["key"]  # the entry's name
        return json.dumps(record, indent=1, sort_keys=True).encode()

    def is_under_its_key(self) -> bool:
        """Whether `key` is what follows from what went in."""
        try:
            return _key(self.step, self.code, self.fields, self.inputs, self.toolchain) == self.key
        except (TypeError, ValueError, RecursionError):  # what no canonical JSON can hold
            return False


def _key(
    kind: str, code: str, fields: Mapping[str, Any], inputs: Mapping[str, str], toolchain: Mapping[str, str]
) -> str:
    made_of = {"step": kind, "code": code, "fields": fields, "toolchain": toolchain}
    return digest_json({**made_of, "inputs": [[name, digest] for name, digest in sorted(inputs.items())]})


def whole_record_of(text: bytes) -> dict[str, Any]:
    """What an entry's text says, its files compared with their digest. Raises Damaged for one that is not whole."""
    record = record_of(text)
    if digest_json(record["files"]) != record["tree"]:
        raise Damaged("its entry is of something else")
    return record


def record_of(text: bytes) -> dict[str, Any]:
    """What an entry's text says, not compared with its digests yet. Raises Damaged for what no entry can say."""
    record: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(text) if len(text) <= MOST_BYTES else None
    if problem := _problem(record):
        raise Damaged(f"its entry {problem}")
    found: dict[str, Any] = record
    return found


def _problem(record: Any) -> str | None:
    """What an entry has that cannot be; None when nothing. Nothing is believed of it, read for it or removed before."""
    if not isinstance(record, dict) or record.keys() != {*_TEXTS, *_OBJECTS, "seconds"}:
        return "cannot be read"
    texts = [record[name] for name in _TEXTS]
    objects = [record[name] for name in _OBJECTS]
    if not all(isinstance(text, str) and len(text) <= _LONGEST for text in texts):
        return "cannot be read"
    if not all(isinstance(each, dict) for each in objects) or type(record["seconds"]) not in (int, float):
        return "cannot be read"
    if not all(isinstance(text, str) for name in ("inputs", "toolchain") for text in record[name].values()):
        return "cannot be read"
    files = record["files"]
    if not 0 <= record["seconds"] <= _LONGEST_RUN:
        return "was made in a time that cannot be"
    if not 0 < len(files) <= _MOST_FILES:
        return f"has {len(files):,} files, which cannot be"
    for name, file in files.items():
        if not _can_be(name, file) or ("/" in name and any(name[:end] in files for end in _slashes(name))):
            return f"has a file {name[:80]!r} that cannot be"
    return None


def _can_be(name: str, file: Any) -> bool:
    """Whether it is `[digest, size, mode]` of a file that may be called so."""
    try:
        check_name(name)
        digest, size, mode = file
        plain = type(digest) is str and type(size) is int and type(mode) is int
        return plain and bool(DIGEST.fullmatch(digest)) and 0 <= size <= _LARGEST and mode in _MODES
    except (MlcBuildError, TypeError, ValueError):
        return False


def _slashes(name: str) -> list[int]:
    return [place for place, letter in enumerate(name) if letter == "/"]
