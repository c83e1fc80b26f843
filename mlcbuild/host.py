"""What Linux has and other systems that can build lack: asked here, and nowhere else.

Each function says what happens without it. Where `LINUX` is false, or a file under /proc or /sys is not there, a build
goes on: with every processor, with a copy in place of a clone, without a death signal.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

LINUX = sys.platform == "linux"
PROC, SYS = Path("/proc"), Path("/sys")  # absent elsewhere: whoever reads a file there expects OSError

_FICLONE = 0x40049409  # _IOW(0x94, 9, int) of linux/fs.h: share the source's extents, copy on write
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def processors() -> list[int]:
    """The logical processors that this process may use; elsewhere, all of them."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def death_signal() -> Callable[[], object]:
    """What has the kernel kill the process that calls it when its parent ends; elsewhere, what does nothing.

    All that it needs is looked up here: the child of a process with threads may find locks held for ever.
    """
    if not LINUX:
        return lambda: None
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def clone(source: int, destination: int) -> None:
    """Make one file share the other's content, by their descriptors. Raises OSError where that cannot be had."""
    import fcntl

    if not LINUX:
        raise OSError("files cannot be cloned on this system")
    fcntl.ioctl(destination, _FICLONE, source)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; false where the system or the file system cannot."""
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if LINUX else None
    if renameat2 is None:
        return False
    code: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return code == 0


def advise(mapped: mmap.mmap, advice: str, *place: int) -> None:
    """Tell the kernel, by the name of a constant of `mmap`, what becomes of a map or of a piece of it; else nothing."""
    import mmap

    if hasattr(mmap, advice):
        mapped.madvise(getattr(mmap, advice), *place)
