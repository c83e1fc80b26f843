"""Locks that die with their holder, temporary folders that the next run can sweep, and builds that are running.

flock is released by the kernel when the last process holding the file open is gone, however it went.
A build holds a lock of its own; the file's modification time is when it began. It relies on what it has found in the
cache, so garbage collection leaves whatever was used since then.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlcbuild.cache.disk import make_file, make_folder, share
from mlcbuild.cache.layout import WORKPLACES, lock_path, run_marks, run_path


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock named by `path`; `waiting` is called once if somebody else has it."""
    make_folder(path.parent)
    told = False
    while True:
        descriptor = _open(path)
        try:
            if not _try_lock(descriptor):
                if not told:
                    waiting()
                    told = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The last holder removes the file, so the one that was waited for may be nobody's lock any more.
            if _is_at(descriptor, path):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@dataclass(frozen=True)
class Workplace:
    """A temporary folder of the store. While `lock` is open in any process, nobody sweeps the folder."""

    path: Path
    lock: int


@contextlib.contextmanager
def workplace(root: Path) -> Iterator[Workplace]:
    """A fresh folder of `root`, removed afterwards; those of dead processes are removed first."""
    folder = root / WORKPLACES
    # Without this lock a sweep could meet a folder between its making and its locking.
    with locked(lock_path(root, WORKPLACES)):
        make_folder(folder)
        sweep(folder)
        place = folder / secrets.token_hex(8)
        make_folder(place)
        lock = _open(place / "lock")
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield Workplace(place, lock)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


def sweep_dead(root: Path) -> None:
    """Remove what killed processes left of `root`."""
    folder = root / WORKPLACES
    if folder.is_dir() and any(folder.iterdir()):
        with locked(lock_path(root, WORKPLACES)):
            sweep(folder)


def sweep(folder: Path) -> None:
    """Remove the workplaces in `folder` that no living process holds. Call under the lock of `workplace`."""
    for place in folder.iterdir():
        try:
            lock = os.open(place / "lock", os.O_RDONLY)
        except PermissionError:  # another user's, who sweeps it himself
            continue
        except OSError:  # its owner was killed while removing it
            shutil.rmtree(place, ignore_errors=True)
            continue
        try:
            if _try_lock(lock):
                shutil.rmtree(place, ignore_errors=True)
        finally:
            os.close(lock)


def begin(root: Path, at_end: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """This process builds from now on, until it ends or the returned function is called; then `at_end` is called too.

    A forked child ends without ending its parent's run.
    """
    stack, ours = contextlib.ExitStack(), os.getpid()
    with contextlib.suppress(OSError):  # a cache that can only be read, a full disk: nothing to hold it with
        stack.enter_context(locked(run_path(root, secrets.token_hex(8))))

    def end() -> None:
        atexit.unregister(end)
        if os.getpid() == ours:
            with stack:
                at_end()

    atexit.register(end)
    return end


def running_since(root: Path) -> float | None:
    """When the oldest build that still runs began (seconds since 1970); None when none runs.

    What dead builds left is removed. A mark that cannot be opened counts as a build that runs.
    """
    began: list[float] = []
    for mark in run_marks(root):
        try:
            when = mark.stat().st_mtime
            descriptor = os.open(mark, os.O_RDONLY)
        except FileNotFoundError:
            continue
        except OSError:
            began.append(when)
            continue
        try:
            # Made a moment ago and not yet locked? Its maker notices that the file is gone, and makes it again.
            if _try_lock(descriptor) and time.time() - when > 1:
                mark.unlink(missing_ok=True)
            else:
                began.append(when)
        except OSError:
            began.append(when)
        finally:
            os.close(descriptor)
    return min(began, default=None)


def _open(path: Path) -> int:
    while make_file(path):
        with contextlib.suppress(FileNotFoundError):  # its holder has just removed it
            return _open_there(path, 0)
    descriptor = _open_there(path, os.O_CREAT)
    share(path)
    return descriptor


def _open_there(path: Path, flags: int) -> int:
    try:
        return os.open(path, os.O_RDWR | flags, 0o666)
    except PermissionError:  # another user's; only some network file systems want a lock to be writable
        return os.open(path, os.O_RDONLY)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
