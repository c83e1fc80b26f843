"""Builds that are running, as far as garbage collection has to know: since when.

Each holds a lock of its own; the file's modification time is when the build began. A build
relies on what it has found in the cache, so whatever was used since then stays until the build is over.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from mlcbuild.cache.layout import run_marks, run_path
from mlcbuild.cache.locks import locked


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
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Made a moment ago and not yet locked? Its maker notices that the file is gone, and makes it again.
            if time.time() - when > 1:
                mark.unlink(missing_ok=True)
            else:
                began.append(when)
        except OSError:
            began.append(when)
        finally:
            os.close(descriptor)
    return min(began, default=None)
