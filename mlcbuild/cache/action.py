"""What one run of a step depends on, and what came of it: keys, and the text of entries."""

from __future__ import annotations

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
_MODES = (0o644, 0o755)
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
        try:
            record = json.loads(text)
            if digest_json(record["files"]) != record["tree"]:
                raise Damaged("its entry is of something else")
            return cls(
                key=key,
                step=str(record["step"]),
                name=str(record["name"]),
                code=record["code"],
                fields=record["fields"],
                inputs=dict(record["inputs"]),
                toolchain=record["toolchain"],
                seconds=float(record["seconds"]),
                tree=Tree({check_name(name): _entry(name, *file) for name, file in record["files"].items()}),
            )
        except Damaged:
            raise
        except (TypeError, KeyError, ValueError, AttributeError, RecursionError, MlcBuildError):
            raise Damaged("its entry cannot be read") from None

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
        except (TypeError, ValueError):  # what no canonical JSON can hold
            return False


def _key(
    kind: str, code: str, fields: Mapping[str, Any], inputs: Mapping[str, str], toolchain: Mapping[str, str]
) -> str:
    made_of = {"step": kind, "code": code, "fields": fields, "toolchain": toolchain}
    return digest_json({**made_of, "inputs": [[name, digest] for name, digest in sorted(inputs.items())]})


def _entry(name: str, digest: str, size: int, mode: int) -> Entry:
    if not DIGEST.fullmatch(digest) or not isinstance(size, int) or mode not in _MODES:
        raise Damaged(f"its entry has a file {name!r} that cannot be")
    return Entry(digest, size, mode, _NOWHERE)
