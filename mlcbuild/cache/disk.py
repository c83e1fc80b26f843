"""What folders of a cache need of the disk: room, said in words where there is none, and rights for several users.

One cache folder may serve several users: what is made in a folder that its group may write to, the group may write to.
Like a git repository with `core.sharedRepository=group`, but the folder itself says so: `chmod g+ws cache`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from mlcbuild.errors import CLOSED, FULL, MlcBuildError, closed, full


@contextlib.contextmanager
def room_in(folder: Path, needed: int | None = None) -> Iterator[None]:
    """Turns "no space left" inside the block into a MlcBuildError that names `folder` and what is needed and free.

    Also what may not be written or read, where the error names the file: that one, whose it is, and what to do.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise MlcBuildError(full(folder, needed)) from None
        if error.errno in CLOSED and isinstance(error.filename, str | bytes | os.PathLike):
            raise MlcBuildError(closed(os.fsdecode(error.filename), error)) from None
        raise


def make_folder(path: Path) -> None:
    """Make the folder and its parents. Each new one takes the group and the group's rights of the one it is in.

    It has them when it appears: made first and given rights then, it would be closed to the group for a moment, and for
    ever if that moment is this process's last.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    if not is_shared(path.parent):
        path.mkdir(exist_ok=True)
        return
    new = path.with_name(f".{secrets.token_hex(8)}")
    new.mkdir()
    share(new)
    try:
        new.rename(path)  # onto an empty folder too, which is then as good as that one was
    except OSError:
        new.rmdir()
        if not path.is_dir():
            raise


def make_file(path: Path) -> bool:
    """Make an empty file in a group's folder, if there is none; it is the group's when it appears (`make_folder`).

    False where the folder is no group's, or its file system has no links: nothing is made then.
    """
    if not is_shared(path.parent):
        return False
    if path.exists():
        return True
    new = path.with_name(f".{secrets.token_hex(8)}")
    new.touch(exist_ok=False)
    try:
        share(new)
        path.hardlink_to(new)  # unlike a rename, this replaces nothing
    except FileExistsError:
        pass
    except OSError:
        return False
    finally:
        new.unlink()
    return True


def share(path: Path) -> None:
    """Give a file or folder of one's own to the group, if the folder that it lies in is the group's."""
    folder = path.parent.stat()
    if not folder.st_mode & stat.S_IWGRP:
        return
    with contextlib.suppress(OSError):  # not ours: its owner has done it, or is about to
        own = path.stat()
        if own.st_gid != folder.st_gid:
            os.chown(path, -1, folder.st_gid)
        rights = stat.S_IRGRP | stat.S_IWGRP
        if stat.S_ISDIR(own.st_mode):
            rights |= stat.S_IXGRP | (folder.st_mode & stat.S_ISGID)
        path.chmod(stat.S_IMODE(own.st_mode) | rights)


def is_shared(folder: Path) -> bool:
    """Whether the folder's group may write to it."""
    return bool(folder.stat().st_mode & stat.S_IWGRP)


@contextlib.contextmanager
def made_for(folder: Path) -> Iterator[None]:
    """What this process makes in `folder` meanwhile is the group's as well, if the folder is; other threads' too."""
    if not is_shared(folder):
        yield
        return
    before = os.umask(0o002)
    try:
        yield
    finally:
        os.umask(before)
