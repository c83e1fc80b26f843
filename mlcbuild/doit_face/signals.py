"""SIGTERM ends a build as Ctrl-C does, forked workers end with their parent, and `| head` is no error."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from doit.exceptions import InvalidCommand
from doit.runner import MThreadRunner

from mlcbuild import host
from mlcbuild.errors import MlcBuildError, plainly

_PATIENCE = 30  # seconds


def end_cleanly() -> None:
    """From now on SIGTERM and SIGINT end this process by SystemExit: with-blocks and finally clauses run.

    What has not ended after half a minute (it waits for a lock of doit's that nobody opens any more; seen with
    `-P process`) is ended by the kernel. The exit status is the shell's: 128 plus the signal's number. A second signal
    ends it at once (children still die: `mlcbuild.engine.child`). Handlers that somebody else has set are left
    alone, and so are ignored signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    ours = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        signal.alarm(_PATIENCE)  # no thread: the signal may have come while a lock of threading is held
        if os.getpid() == ours:
            sys.stderr.write("\ninterrupted: what is finished is kept, the next run goes on from there\n")
        raise SystemExit(128 + number)

    for number, default in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) == default:
            signal.signal(number, end)


def die_with_parent_after_fork() -> None:
    """Worker processes that doit forks (`-P process`) get a death signal, or a killed doit would leave them waiting."""
    os.register_at_fork(after_in_child=host.death_signal())


def end_with_reader() -> None:
    """From now on this process ends without a word when nobody reads any more what it prints, as `ls | head` does.

    For what only shows something: a build would lose what it has begun, and connections end processes likewise.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


@contextlib.contextmanager
def outlive_reader() -> Iterator[None]:
    """When what is printed here cannot be written any more (nobody reads it, the disk is full), print into the void."""
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):
                sys.stderr.write(f"the output cannot be written: {error.strerror}; the build goes on without it\n")


class _Worker(MThreadRunner.DaemonThread):  # type: ignore[misc]
    """A thread of doit's that says in words why it cannot be started: what `ulimit -v` or `-u` leaves is too little."""

    def start(self) -> None:
        with for_doit():
            super().start()


def start_in_words() -> None:
    MThreadRunner.Child = staticmethod(_Worker)


@contextlib.contextmanager
def for_doit() -> Iterator[None]:
    """What goes wrong in words ends doit as a wrong command line does: doit shows tracebacks of all else."""
    try:
        with plainly():
            yield
    except MlcBuildError as error:
        raise InvalidCommand(str(error)) from None
