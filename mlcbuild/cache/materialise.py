"""A blob of the store made a file somewhere else, without a second copy of large content where that can be had."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from mlcbuild import host
from mlcbuild.cache.action import Damaged
from mlcbuild.cache.files import hash_file
from mlcbuild.cache.tree import Entry

# Blobs, and files made from them, carry this time (1980-01-01, the earliest that every archive format can hold). A
# blob with another one has been written to since, and is hashed before it is believed.
BLOB_TIME = 315_532_800
BLOB_MODE = 0o444

_SMALL = 1 << 20  # a copy of this many bytes is nothing, and unlike a hard link it does not expose the blob
_CHUNK = 1 << 20


def materialise(
    entry: Entry, destination: Path, *, link: bool = True, read: Callable[[int], None] = lambda count: None
) -> None:
    """Make `destination` a read-only file with the entry's content, whose every byte is read and hashed.

    By reflink where the file system can; else by hard link, for large files that this process could not write to by
    mistake; else, and for `link=False` (content that is not the store's own), by copy. `read` is told of bytes.
    Raises Damaged when the content is not what its name says.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    mode = BLOB_MODE | (0o111 if entry.mode & 0o111 else 0)
    linked = False
    if _reflink(entry.path, destination):
        digest = hash_file(destination, read)
    else:
        linked = link and entry.size > _SMALL and mode == BLOB_MODE and _hard_link(entry.path, destination)
        digest = hash_file(destination, read) if linked else _copy(entry.path, destination, read)
    if digest != entry.digest:
        raise Damaged(
            f"{entry.path}: the content is not what its digest says (a failing disk, or something wrote to it)"
        )
    if not linked:  # else time and mode are the blob's own
        destination.chmod(mode)
        os.utime(destination, (BLOB_TIME, BLOB_TIME))


def _reflink(source: Path, destination: Path) -> bool:
    with source.open("rb") as reader, destination.open("wb") as writer:
        try:
            host.clone(reader.fileno(), writer.fileno())
        except OSError:
            destination.unlink()
            return False
    return True


def _hard_link(source: Path, destination: Path) -> bool:
    # To root a read-only file is as any other: `r+b` on it in dist/ would write into the cache, and nobody would know.
    if os.access(source, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        return False
    try:
        destination.hardlink_to(source)
    except OSError:  # another file system, or one without links
        return False
    return True


def _copy(source: Path, destination: Path, read: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as reader, destination.open("wb", buffering=0) as writer:
        while chunk := reader.read(_CHUNK):
            digest.update(chunk)
            writer.write(chunk)
            read(len(chunk))
    return digest.hexdigest()
