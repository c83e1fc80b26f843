"""A hub's answer about a repository, looked at before anything of it is used: which commit, and which files it has.

The form is that of huggingface.co's `/api/models/OWNER/NAME?blobs=true`; what is not read of it may be anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlcbuild.checkpoints.header import climbs
from mlcbuild.errors import CheckpointError
from mlcbuild.recipes.types import LockedFile

LARGEST_FILE = 1 << 42  # bytes; hubs take files of a few hundred gigabytes
LONGEST_NAME = 255  # bytes of each part of a file's name, as file systems have it
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Listed:
    """A file as the listing has it: its size, where that is said, and its digest, if it is stored as a large file."""

    size: int | None
    large: LockedFile | None


@dataclass(frozen=True)
class Listing:
    """`entries` are as the hub gave them: `file` looks at one that is needed."""

    asked: str
    commit: str
    entries: Mapping[str, Mapping[str, Any]]

    def file(self, name: str) -> Listed:
        """Raises CheckpointError for a name that cannot be a file's here, and for a size or digest that is none."""
        entry = self.entries[name]
        if not is_name(name):
            raise self.refusal(f"file name {name!r:.200} is refused: it cannot be the name of a file in a folder here")
        size, large = entry.get("size"), entry.get("lfs")
        if size is not None and not _is_size(size):
            raise self.refusal(f"{name}: `size` is {size!r:.100}, expected a number of bytes")
        if large is None:
            return Listed(size, None)
        if not isinstance(large, dict) or not _fits(_SHA256, large.get("sha256")) or not _is_size(large.get("size")):
            raise self.refusal(f"{name}: `lfs` is {large!r:.200}, expected `sha256` (64 hex digits) and `size`")
        if size is not None and size != large["size"]:
            raise self.refusal(f"{name}: `size` is {size}, and {large['size']} in `lfs`")
        return Listed(large["size"], LockedFile(large["sha256"], large["size"]))

    def refusal(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.asked}: the hub's answer is refused: {text}")


def read_listing(content: bytes, asked: str) -> Listing:
    """The listing that a hub sent. Raises CheckpointError, with `asked` in front, for what is none."""
    info = parsed(content)
    if not isinstance(info, dict):
        raise CheckpointError(f"{asked}: the hub's answer is not JSON: is HF_ENDPOINT the address of a hub?")
    commit, siblings = info.get("sha"), info.get("siblings")
    found = Listing(asked, commit if isinstance(commit, str) else "", {})
    if not _fits(_COMMIT, commit):
        raise found.refusal(f"`sha` is {commit!r:.100}, expected a commit (40 hex digits)")
    if not isinstance(siblings, list):
        raise found.refusal(f"`siblings` is {siblings!r:.100}, expected a list of files")
    entries: dict[str, Mapping[str, Any]] = {}
    for each in siblings:
        name = each.get("rfilename") if isinstance(each, dict) else None
        if not isinstance(name, str):
            raise found.refusal(f"`siblings` has {each!r:.100}, expected a file with its `rfilename`")
        if name in entries:
            raise found.refusal(f"`siblings` has {name!r:.100} twice")
        entries[name] = each
    return Listing(asked, found.commit, entries)


def parsed(content: bytes, wrong: Callable[[Exception], Any] = lambda error: None) -> Any:
    """What JSON says; `wrong` of the error where it is none, or nested too deeply."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        return wrong(error)


def is_name(name: str) -> bool:
    """Whether it can be a file's name in a checkpoint's folder: relative, normal, printable, and not too long."""
    parts = name.split("/")
    return (
        not climbs(name)
        and name.isprintable()
        and not {"", "."} & {*parts}
        and all(len(part.encode()) <= LONGEST_NAME for part in parts)
        and len(name) <= 4 * LONGEST_NAME
    )


def _fits(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_FILE
