"""A full disk, said in words."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from mlcbuild.errors import MlcBuildError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def room_in(folder: Path, needed: int | None = None) -> Iterator[None]:
    """Turns "no space left" inside the block into a MlcBuildError that names `folder` and what is needed and free."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise MlcBuildError(full(folder, needed)) from None


def full(folder: Path, needed: int | None = None) -> str:
    """The text for a disk (or quota) that `folder` lies on and that is full."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    want = f"{needed:,} bytes are needed, " if needed is not None else ""
    return (
        f"{folder}: the disk is full: {want}{shutil.disk_usage(folder).free:,} bytes are free. "
        "Free some space, or put the cache elsewhere (cache=DIR); what is already built is kept"
    )
