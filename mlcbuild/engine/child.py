"""`python -m mlcbuild.engine.child EVENTS LIFE MEMORY`: one step in a process of its own; it never outlives its parent.

Two processes come of this. The one that was started stays small and only watches: it holds the reading end of a pipe
whose writing end exists in the parent alone, so that the end of that pipe is the end of the parent, however it came.
It then kills the process group of the other one, the worker, compilers and linkers that the worker started included.
The worker asks the kernel to die with the watcher, in case that is killed first.

The request comes as JSON on stdin, with the places for it (`mlcbuild.engine.job`); events go as JSON lines to the
descriptor EVENTS. The last event is `done`, `failed` (the text is for the user), `broke` (a bug: the traceback is in
the log) or `died`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

from mlcbuild import host

_EVERY = 0.5  # seconds between two looks at the memory that a step has taken
_RAN_AWAY = (
    "it took more than {:.1f} GB of memory, far more than a step of its kind needs, and was stopped "
    "(MLCBUILD_STEP_MEMORY=24G lets steps take more)"
)
_LAST_LINES = 3  # of a traceback, for the user; the log has all of it


def main(events: int, life: int, memory: int = 0) -> NoReturn:
    """Watch a forked worker until it ends, the parent does, or it takes more bytes than `memory` (0: any number).

    Exits with the worker's status.
    """
    wakeup, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, so that the wakeup descriptor is written to
    watcher = os.getpid()
    worker = os.fork()
    if worker == 0:
        signal.set_wakeup_fd(-1)
        for descriptor in (life, wakeup, wake):
            os.close(descriptor)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.setpgid(0, 0)
        die_with(watcher)
        _work(events)
    # Both sides set the group: whoever is first, it exists before it can be needed.
    with contextlib.suppress(OSError):
        os.setpgid(worker, worker)

    def end(number: int, frame: FrameType | None) -> None:
        _kill(worker)
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    while True:
        ready, _, _ = select.select([life, wakeup], [], [], _EVERY if memory else None)
        if life in ready:  # nothing is ever written there, so this is its end
            _kill(worker)
            os._exit(1)
        if not ready:
            if _taken(worker) > memory:
                _kill(worker)
                _send(events, {"event": "failed", "text": _RAN_AWAY.format(memory / 1e9)})
                os._exit(1)
            continue
        os.read(wakeup, 64)
        ended = os.waitid(os.P_PID, worker, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            break
    _kill(worker)  # before reaping, while the number is still the worker's: what it left running goes too
    _, status = os.waitpid(worker, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        _send(events, {"event": "died", "signal": -code})
    os._exit(code if code >= 0 else 1)


def _kill(worker: int) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(worker, signal.SIGKILL)


def _taken(group: int) -> int:
    """Bytes that the processes of the group have for themselves alone: files that they have mapped do not count."""
    total, numbers = 0, list[str]()
    with contextlib.suppress(OSError), os.scandir(host.PROC) as entries:  # where there is none, there is no limit
        numbers = [entry.name for entry in entries if entry.name.isdigit()]
    for number in numbers:
        with contextlib.suppress(OSError, ValueError):  # it has just ended
            if os.getpgid(int(number)) == group:
                total += own_memory(int(number))
    return total


def own_memory(process: int) -> int:
    """Bytes that a process has for itself alone; 0 where that cannot be known."""
    with contextlib.suppress(OSError, ValueError):  # it has just ended
        lines = (host.PROC / str(process) / "status").read_text(encoding="utf-8").splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
    return 0


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` ends, whose child it is."""
    host.death_signal()()
    if os.getppid() != parent:
        os._exit(1)  # it was already gone, and the request to the kernel came too late


def without_torch() -> None:
    """Have this process find no torch, with which nothing of ours computes.

    tvm_ffi imports it where it is installed: two thirds of the time of `import tvm`, nine tenths of its own.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def _work(events: int) -> NoReturn:
    """Run the step that stdin describes. Ends the process at once, without the interpreter's farewells."""
    import faulthandler
    import json

    faulthandler.enable()
    without_torch()
    last: dict[str, Any]
    try:
        last = _run(json.load(sys.stdin), events)
    except BaseException as error:
        last = _failure(error)
    with contextlib.suppress(OSError, ValueError):  # a full disk may refuse the log's last words
        sys.stdout.flush()
        sys.stderr.flush()
    _send(events, last)
    os._exit(0 if last["event"] == "done" else 1)


def _run(document: dict[str, Any], events: int) -> dict[str, Any]:
    import importlib

    from mlcbuild.cache.disk import room_in
    from mlcbuild.cache.layout import COMPILED
    from mlcbuild.engine.job import Job, Places, Request
    from mlcbuild.errors import MlcBuildError, bounded
    from mlcbuild.zig import SHARED

    request, places = Request.from_json(document["request"]), Places.from_json(document["places"])
    job = Job(request, places, events)
    os.environ.setdefault(SHARED, str(places.cache / COMPILED))
    try:
        with room_in(places.cache):
            importlib.import_module(request.module).run(job)
    except MlcBuildError as error:
        return {"event": "failed", "text": bounded(str(error))}
    reused = {name: entry.to_json() for name, entry in job.reused.items()}
    return {"event": "done", "reused": reused}


def _failure(error: BaseException) -> dict[str, Any]:
    """The event for what the step has no sentence for itself. The log gets the traceback, whatever it is."""
    import traceback

    from mlcbuild.errors import bounded, in_words

    text = traceback.format_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
    words = in_words(error)
    if words is not None:
        return {"event": "failed", "text": bounded(words), "logged": True}
    return {"event": "broke", "text": bounded("\n".join(text.strip().splitlines()[-_LAST_LINES:]))}


def _send(events: int, event: dict[str, Any]) -> None:
    import json

    data = b"\n" + json.dumps(event).encode() + b"\n"  # a killed worker may have left half a line
    with contextlib.suppress(BrokenPipeError):
        while data:
            data = data[os.write(events, data) :]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
