"""A command that reads what others made, watched as a step is: within a bound of memory and of time.

It runs in a fork of this process, which keeps its terminal and prints by itself; this one only waits.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable

from mlcbuild.cache.gc import parse_size
from mlcbuild.engine.child import die_with, own_memory
from mlcbuild.engine.resources import LEAST_LIMIT, silence_limit
from mlcbuild.errors import MlcBuildError
from mlcbuild.text import duration

_EVERY = 0.2  # seconds between two looks


def watched(run: Callable[[], int]) -> int:
    """The exit status of `run`, which is stopped where it takes too much.

    Raises MlcBuildError then, and where the fork dies of a signal.
    """
    given = os.environ.get("MLCBUILD_STEP_MEMORY")
    memory, patience = parse_size(given) if given else LEAST_LIMIT, silence_limit()
    sys.stdout.flush()
    sys.stderr.flush()
    me, child = os.getpid(), os.fork()
    if child == 0:
        status = 1
        try:
            die_with(me)
            status = run()
            sys.stdout.flush()
        finally:
            sys.stderr.flush()
            os._exit(status)
    try:
        problem = _waited(child, memory, patience)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    if problem:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if problem:
        raise MlcBuildError(problem)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise MlcBuildError(f"killed by {signal.Signals(-code).name}: by somebody, for lack of memory, or by a crash")
    return code


def _waited(child: int, memory: int, patience: float) -> str | None:
    """None once it has ended; a sentence once it takes more bytes, or seconds."""
    started, end = time.monotonic(), os.pidfd_open(child)
    try:
        while not select.select([end], [], [], _EVERY)[0]:
            if own_memory(child) > memory:
                return (
                    f"it took more than {memory / 1e9:.1f} GB of memory and was stopped: no checkpoint needs that to "
                    "be looked at (MLCBUILD_STEP_MEMORY=24G allows more)"
                )
            if time.monotonic() - started > patience:
                return (
                    f"it took more than {duration(patience)} and was stopped: no checkpoint needs that to be looked at "
                    "(MLCBUILD_STEP_SILENCE=MINUTES allows more)"
                )
    finally:
        os.close(end)
    return None
