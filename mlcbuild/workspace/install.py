"""dist/<recipe>/: put there in one rename, and known to be what its manifest says."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlcbuild.cache.disk import room_in
from mlcbuild.cache.files import hash_file
from mlcbuild.cache.materialise import BLOB_MODE, BLOB_TIME, materialise
from mlcbuild.cache.store import Store, total_size
from mlcbuild.cache.tree import Entry
from mlcbuild.workspace.manifest import NAME as MANIFEST

# What publishing adds to a package. It follows from the manifest, and no build depends on it.
BESIDE = ("published.json", "provenance.intoto.json", "sbom.cdx.json")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def is_installed(dist: Path, name: str, files: Mapping[str, Entry], manifest: bytes) -> bool:
    """Whether dist/<name> holds exactly these files and this manifest.

    A file with the size and the modification time that it was installed with is believed; another is hashed.
    """
    folder = dist / name
    try:
        if (folder / MANIFEST).read_bytes() != manifest or staging(dist, name).exists():
            return False
        if _names(folder) - set(BESIDE) != {MANIFEST, *files}:
            return False
        return all(_is_whole(folder / file, entry) for file, entry in files.items())
    except OSError:
        return False


def install(dist: Path, name: str, files: Mapping[str, Entry], manifest: bytes, store: Store) -> None:
    """Make dist/<name> hold these files and this manifest, at once: a reader sees the old package or the new one.

    Raises MlcBuildError when the disk is full or a blob turns out to be damaged.
    """
    with room_in(dist, total_size(files.values())), _locked(dist):
        new = staging(dist, name)
        remove_tree(new)  # left by a process that was killed: whoever lives would hold the lock
        for file, entry in files.items():
            materialise(entry, new / file, link=store.owns(entry.path))
        (new / MANIFEST).write_bytes(manifest)
        (new / MANIFEST).chmod(BLOB_MODE)
        os.utime(new / MANIFEST, (BLOB_TIME, BLOB_TIME))
        _replace(new, dist / name)
        remove_tree(new)


def uninstall(dist: Path, name: str) -> bool:
    """Remove dist/<name>; whether it was there."""
    if not (dist / name).exists():
        return False
    with _locked(dist):
        new = staging(dist, name)
        remove_tree(new)
        (dist / name).rename(new)  # no half-removed package under the real name
        remove_tree(new)
    return True


def remove_tree(folder: Path) -> None:
    """Remove a folder, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def staging(dist: Path, name: str) -> Path:
    """Where the package is put together. It is only there while somebody does that, or was killed at it."""
    return dist / f".new-{name}"


@contextlib.contextmanager
def _locked(dist: Path) -> Iterator[None]:
    """Hold `dist` against other installs. The lock is on the folder itself: a file would be one more thing in it."""
    dist.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(dist, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(new: Path, place: Path) -> None:
    """Rename `new` to `place`. What was there is afterwards at `new`, if anything was."""
    try:
        new.rename(place)
    except OSError:  # it exists and is not empty
        if not _exchange(new, place):
            aside = new.with_name(f"{new.name}-{secrets.token_hex(4)}")
            place.rename(aside)
            new.rename(place)
            aside.rename(new)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, where the system and the file system can."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    code: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return code == 0


def _names(folder: Path) -> set[str]:
    return {Path(parent, name).relative_to(folder).as_posix() for parent, _, names in os.walk(folder) for name in names}


def _is_whole(path: Path, entry: Entry) -> bool:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size != entry.size:
        return False
    return status.st_mtime == BLOB_TIME or hash_file(path) == entry.digest
