"""What a checkpoint brings along that is a program, run in a process of its own and within bounds.

The process is a fork of this one, so it starts in a few milliseconds and has everything that it needs. The system ends
it when it has used up its time of a processor; to be stopped or to wait costs nothing.
"""

from __future__ import annotations

import os
import resource
import select
import signal
from collections.abc import Callable
from typing import NoReturn

from mlcbuild import host
from mlcbuild.errors import MlcBuildError

SECONDS = 5  # of a processor; a template takes a thousandth of one
MEMORY = 1 << 30  # bytes beside what this process has
LONGEST = 4 << 20  # bytes of a text
_PATIENCE = 300.0  # seconds of silence: of a process that neither computes nor ends
_FINE, _WRONG, _FULL = b"\xfd", b"\xfe", b"\xff"  # what ends an answer that is complete: no text has these bytes


def text_of(make: Callable[[], str], what: str) -> str:
    """The text that `make` gives there. `what` begins the message.

    Raises MlcBuildError where `make` does, and where it takes more time, memory or room than the bounds allow.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _work(make, what, writing)
    os.close(writing)
    try:
        answer = _received(reading)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if len(answer) <= LONGEST and answer[-1:] in (_FINE, _WRONG):
        text = answer[:-1].decode("utf-8", "surrogatepass")
        if answer[-1:] == _WRONG:
            raise MlcBuildError(text)
        return text
    if len(answer) > LONGEST:
        reason = f"makes a text of more than {LONGEST:,} bytes"
    elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        reason = f"takes more than {SECONDS} seconds of a processor"
    else:
        reason = f"takes more than {MEMORY:,} bytes of memory"
    raise MlcBuildError(f"{what} {reason}, for a conversation of a few lines: it is not one that can be used")


def _received(reading: int) -> bytes:
    """What comes until the process ends, or more than there may be."""
    answer = bytearray()
    while len(answer) <= LONGEST:
        ready, _, _ = select.select([reading], [], [], _PATIENCE)
        piece = os.read(reading, 1 << 16) if ready else b""
        if not piece:
            break
        answer += piece
    return bytes(answer)


def _work(make: Callable[[], str], what: str, writing: int) -> NoReturn:
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        statistics = host.PROC / "self/statm"
        if statistics.exists():
            size = int(statistics.read_text().split()[0]) * resource.getpagesize()
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            wanted = size + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))
        try:
            answer = make().encode("utf-8", "surrogatepass") + _FINE
        except MlcBuildError as error:
            answer = str(error).encode("utf-8", "surrogatepass") + _WRONG
        except MemoryError:
            answer = _FULL
        except Exception as error:  # of ours: not to be told as if it were the template's
            answer = f"{what}: {type(error).__name__}: {error}".encode("utf-8", "replace") + _WRONG
        with open(writing, "wb") as pipe:
            pipe.write(answer)
    finally:
        os._exit(0)  # none of what ends the parent's process is this one's to do
