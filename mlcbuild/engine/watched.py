"""A command that reads what others made, watched as a step is: within a bound of memory and of time.

It runs in a fork of this process, which keeps its terminal and prints by itself; this one only waits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from mlcbuild.engine.child import die_with, own_memory
from mlcbuild.engine.resources import LEAST_LIMIT, most_memory, silence_limit
from mlcbuild.errors import MlcBuildError
from mlcbuild.text import amount, duration

_SOONEST, _EVERY = 0.005, 0.2  # seconds between two looks, at first and later


def watched(run: Callable[[], int]) -> int:
    """The exit status of `run`, which is stopped where it takes too much.

    Raises MlcBuildError then, and where the fork dies of a signal.
    """
    memory, patience = most_memory(LEAST_LIMIT), silence_limit()
    sys.stdout.flush()
    sys.stderr.flush()
    me, child = os.getpid(), os.fork()
    if child == 0:
        status = 1
        try:
            die_with(me)
            status = run()
            sys.stdout.flush()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:  # a bug: the parent would know no more than the status
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(status)
    ended = None
    try:
        ended = _waited(child, memory, patience)
    finally:
        if ended is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(ended)
    if code < 0:
        raise MlcBuildError(f"killed by {signal.Signals(-code).name}: by somebody, for lack of memory, or by a crash")
    return code


def _waited(child: int, memory: int, patience: float) -> int:
    """The status that it ends with, as `waitpid` has it. Raises MlcBuildError once it takes more bytes, or seconds."""
    started, pause = time.monotonic(), _SOONEST
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if own_memory(child) > memory:
            raise _stopped(f"{amount(memory)} of memory", "MLCBUILD_STEP_MEMORY", "24G")
        if time.monotonic() - started > patience:
            raise _stopped(duration(patience), "MLCBUILD_STEP_SILENCE", "MINUTES")
        time.sleep(pause)
        pause = min(_EVERY, 1.2 * pause)


def _stopped(bound: str, variable: str, example: str) -> MlcBuildError:
    why = "" if os.environ.get(variable) else ": no checkpoint needs that to be looked at"
    return MlcBuildError(f"it took more than {bound} and was stopped{why} ({variable}={example} allows more)")
