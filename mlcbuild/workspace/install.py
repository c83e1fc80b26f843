"""dist/<recipe>/: put there in one rename, and known to be what its manifest says."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlcbuild import host
from mlcbuild.cache.action import Damaged
from mlcbuild.cache.disk import room_in
from mlcbuild.cache.files import AT_ONCE, Progress, counting, hash_file, nobody
from mlcbuild.cache.materialise import BLOB_MODE, BLOB_TIME, materialise
from mlcbuild.cache.store import Store, total_size
from mlcbuild.cache.tree import Entry
from mlcbuild.regular import read_regular
from mlcbuild.workspace.manifest import NAME as MANIFEST

# What publishing adds to a package. It follows from the manifest, and no build depends on it.
BESIDE = ("published.json", "provenance.intoto.json", "sbom.cdx.json")


def is_installed(dist: Path, name: str, files: Mapping[str, Entry], manifest: bytes) -> bool:
    """Whether dist/<name> holds exactly these files and this manifest.

    A file with the size and the modification time that it was installed with is believed; another is hashed.
    """
    folder = dist / name
    try:
        return _has_names(dist, name, files, manifest) and all(
            _is_whole(folder / file, entry) for file, entry in files.items()
        )
    except OSError:
        return False


def damages(
    dist: Path, name: str, files: Mapping[str, Entry], manifest: bytes, progress: Progress = nobody
) -> list[str]:
    """What of dist/<name> is not these files and this manifest, a line each: every byte is read.

    Raises OSError for a file that cannot be read.
    """
    folder = dist / name
    if not (folder / MANIFEST).is_file() or not _has_names(dist, name, files, manifest):
        return [f"{folder}: its manifest or its names are not what was built"]
    told = counting(progress, files.values())

    def look(item: tuple[str, Entry]) -> str | None:
        path, entry = folder / item[0], item[1]
        if not stat.S_ISREG(path.lstat().st_mode):
            return f"{path}: is no plain file"
        digest = hash_file(path, told)
        return None if digest == entry.digest else f"{path}: its sha256 is {digest[:16]}…, not {entry.digest[:16]}…"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [*filter(None, pool.map(look, files.items()))]


def install(
    dist: Path,
    name: str,
    files: Mapping[str, Entry],
    manifest: bytes,
    store: Store,
    progress: Progress = nobody,
) -> None:
    """Make dist/<name> hold these files and this manifest, at once: a reader sees the old package or the new one.

    Every byte is hashed on its way. Raises Damaged when a blob turns out not to be what its name says; it is gone from
    the store then. Raises MlcBuildError when the disk is full.
    """
    with room_in(dist, total_size(files.values())), _locked(dist):
        new = staging(dist, name)
        remove_tree(new)  # left by a process that was killed: whoever lives would hold the lock
        told = counting(progress, files.values())
        with ThreadPoolExecutor(AT_ONCE) as pool:
            made = [pool.submit(_put, store, entry, new / file, told) for file, entry in files.items()]
        if wrong := [text for each in made if (text := each.result())]:
            remove_tree(new)
            raise Damaged("\n".join(dict.fromkeys(wrong)))
        (new / MANIFEST).write_bytes(manifest)
        (new / MANIFEST).chmod(BLOB_MODE)
        os.utime(new / MANIFEST, (BLOB_TIME, BLOB_TIME))
        _replace(new, dist / name)
        remove_tree(new)


def uninstall(dist: Path, name: str) -> bool:
    """Remove dist/<name>; whether it was there."""
    if not (dist / name).exists():
        return False
    with room_in(dist), _locked(dist):
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


def _put(store: Store, entry: Entry, place: Path, told: Callable[[int], None]) -> str | None:
    """Make the file; what is wrong with its content in the store, where that is so."""
    try:
        materialise(entry, place, link=store.owns(entry.path), read=told)
    except (Damaged, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.EIO):
            raise
        place.unlink(missing_ok=True)  # if it is a link, it is the same file
        try:
            store.prove([entry])
        except Damaged as error:
            return str(error)
        return f"{place}: was written, and reads back as something else: check the disk"
    return None


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
        if not host.exchange(new, place):
            aside = new.with_name(f"{new.name}-{secrets.token_hex(4)}")
            place.rename(aside)
            new.rename(place)
            aside.rename(new)


def _has_names(dist: Path, name: str, files: Mapping[str, Entry], manifest: bytes) -> bool:
    """Whether dist/<name> has this manifest and files of these names, and nobody was killed at putting it there."""
    folder = dist / name
    if read_regular(folder / MANIFEST) != manifest or staging(dist, name).exists():
        return False
    return _names(folder) - set(BESIDE) == {MANIFEST, *files}


def _names(folder: Path) -> set[str]:
    return {Path(parent, name).relative_to(folder).as_posix() for parent, _, names in os.walk(folder) for name in names}


def _is_whole(path: Path, entry: Entry) -> bool:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size != entry.size:
        return False
    return status.st_mtime == BLOB_TIME or hash_file(path) == entry.digest
