"""A blob of the store made a file somewhere else, without a second copy of large content where that can be had."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from mlcbuild.cache.tree import Entry
from mlcbuild.errors import MlcBuildError

# Blobs, and files made from them, carry this time (1980-01-01, the earliest that every archive format can hold). A
# blob with another one has been written to since, and is hashed before it is believed.
BLOB_TIME = 315_532_800
BLOB_MODE = 0o444

_FICLONE = 0x40049409  # _IOW(0x94, 9, int) of linux/fs.h: share the source's extents, copy on write
_SMALL = 1 << 20  # a copy of this many bytes is nothing, and unlike a hard link it does not expose the blob
_CHUNK = 1 << 20


def materialise(entry: Entry, destination: Path, *, link: bool = True) -> None:
    """Make `destination` a read-only file with the entry's content.

    By reflink where the file system can; else small files are copied, and checked on the way; else by hard link; else,
    and for `link=False` (content that is not the store's own), by copy.
    Raises MlcBuildError when a copied blob's content is not what its name says.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    mode = BLOB_MODE | (0o111 if entry.mode & 0o111 else 0)
    if _reflink(entry.path, destination):
        pass
    elif link and entry.size > _SMALL and mode == BLOB_MODE and _hard_link(entry.path, destination):
        return  # time and mode are the blob's own
    else:
        _copy(entry, destination)
    destination.chmod(mode)
    os.utime(destination, (BLOB_TIME, BLOB_TIME))


def _reflink(source: Path, destination: Path) -> bool:
    with source.open("rb") as reader, destination.open("wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError:
            destination.unlink()
            return False
    return True


def _hard_link(source: Path, destination: Path) -> bool:
    try:
        destination.hardlink_to(source)
    except OSError:  # another file system, or one without links
        return False
    return True


def _copy(entry: Entry, destination: Path) -> None:
    digest = hashlib.sha256()
    with entry.path.open("rb") as reader, destination.open("wb") as writer:
        while chunk := reader.read(_CHUNK):
            digest.update(chunk)
            writer.write(chunk)
    if digest.hexdigest() != entry.digest:
        raise MlcBuildError(
            f"{entry.path}: the content is not what its digest says (a failing disk, or something wrote to it): "
            "remove the file, then build again"
        )
