"""How a cache folder is laid out. This is the only place that spells it; a shared cache has the same entries and blobs.

    ac/ab/<key>.json    action -> {tree, files: {name: [digest, size, mode]}, step, name, inputs, fields, toolchain,
                        code, seconds}
    cas/cd/<sha256>     a read-only blob
    cas/cd/<sha256>.at  a borrowed blob: where a file with this content lies outside the store, and its stat
    locks/              <key>, `tmp`, `recipes.lock`, `hub-<repository>`: who is at it; run-<random>: a build that runs
    tmp/<random>/       workplaces of processes
    logs/               what failed or talkative steps wrote
    pins/               <recipe>@<workspace>.json; dist/<digest of the folder>.json: an installed package
    partial/            what has arrived of downloads that broke off
    test-run/           what `mlcbuild test-run` made and installed
    compiled/           zig's own cache: the kernels that libraries have in common
    unchanged/          what the fast path remembers, a file per workspace
    recipes.memo        parsed YAML files
    index.sqlite        what was learned about files, by their stat

Names are relative to the folder and plain strings: the fast path asks for ten thousands of them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

ACTIONS, BLOBS = "ac", "cas"
BORROWED = ".at"  # what a borrowed blob's record is called behind its digest
LOCKS, WORKPLACES, LOGS, PINS = "locks", "tmp", "logs", "pins"
PARTIAL, TEST_RUN, UNCHANGED, COMPILED = "partial", "test-run", "unchanged", "compiled"
LOOSE = (TEST_RUN, PARTIAL, COMPILED)  # worth keeping only where there is room
INDEX, RECIPES_MEMO = "index.sqlite", "recipes.memo"
_RUN = "run-"
_ABSENT = (  # not there, shut, or nothing that the cache would read
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO,
)  # fmt: skip


def action_name(key: str) -> str:
    """The name of an action's entry."""
    return f"{ACTIONS}/{key[:2]}/{key}.json"


def blob_name(digest: str) -> str:
    """The name of a blob of the store's own."""
    return f"{BLOBS}/{digest[:2]}/{digest}"


def borrowed_name(digest: str) -> str:
    """The name of a borrowed blob's record."""
    return f"{blob_name(digest)}{BORROWED}"


def action_files(root: Path) -> Iterator[Path]:
    """The entries of all actions, whole or not, in no order. Raises OSError where that cannot be known."""
    return (Path(entry.path) for entry in action_entries(root))


def action_entries(root: Path) -> Iterator[os.DirEntry[str]]:
    """The same, as the folders' listings have them: there may be a million."""
    for folder in listed(f"{root}/{ACTIONS}"):
        if folder.is_dir():
            yield from (entry for entry in listed(folder.path) if entry.name.endswith(".json"))


def listed(folder: str | Path) -> list[os.DirEntry[str]]:
    """What lies in a folder; nothing in one that is absent. Raises OSError where it cannot be known."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        if not is_absent(error):
            raise
        return []


def is_absent(error: OSError) -> bool:
    """Whether a file or folder counts as not there. What a failing disk or a lost server has may be needed: to take it
    for absent would make garbage of blobs."""
    return error.errno in _ABSENT


def lock_path(root: Path, name: str) -> Path:
    """The lock called `name`: an action's key, or what else only one process may do at a time."""
    return root / LOCKS / name


def run_path(root: Path, name: str) -> Path:
    """The mark of one build that runs."""
    return lock_path(root, f"{_RUN}{name}")


def run_marks(root: Path) -> Iterator[Path]:
    """The marks of all builds that run, or were killed."""
    return (root / LOCKS).glob(f"{_RUN}*")


def pin_path(root: Path, recipe: str, workspace: str) -> Path:
    """The pin of a recipe of a workspace, which is named by a digest of its place; `*`: any recipe, any workspace."""
    return root / PINS / f"{recipe}@{workspace}.json"


def package_path(root: Path, folder: str) -> Path:
    """The note of a package that is installed in a folder, which is named by a digest of its place; `*`: any."""
    return root / PINS / "dist" / f"{folder}.json"
