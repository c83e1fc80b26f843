"""A step's process, seen from the parent: started with a request, listened to, and gone when this function is."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlcbuild
from mlcbuild.cache.disk import is_shared, make_folder
from mlcbuild.cache.locks import Workplace
from mlcbuild.engine.job import Places, Request
from mlcbuild.engine.resources import silence_limit
from mlcbuild.errors import StepFailed
from mlcbuild.text import duration

_PATIENCE = 10.0  # seconds for a killed step to be gone; it takes milliseconds


class StepBroke(StepFailed):
    """A step ended in a way that it should not be able to: a bug in it, or a signal."""


def run(
    request: Request, places: Places, place: Workplace, log: Path, on_event: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """Run one step and return its `done` event. `on_event` is called with each `progress` and `note`.

    stdout and stderr go to `log`.
    Whatever ends this call (an exception, a signal, the death of this process) also ends the step and all of its
    children. Raises StepFailed with the step's own text, StepBroke with the reason and the log's place.
    """
    asked = place.path / "request.json"
    asked.write_text(json.dumps({"request": request.to_json(), "places": places.to_json()}), encoding="utf-8")
    make_folder(log.parent)
    log.unlink(missing_ok=True)  # it may be another user's
    events, events_end = os.pipe()
    life, life_end = os.pipe()
    process = None
    try:
        with asked.open("rb") as stdin, log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mlcbuild.engine.child", str(events_end), str(life), str(request.memory)],
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                # The lock of the workplace goes along: it is swept only when the step's processes are gone as well.
                pass_fds=(events_end, life, place.lock),
                start_new_session=True,
                cwd=places.scratch,
                env=_environment(),
                umask=0o002 if is_shared(place.path) else -1,  # another user may have to sweep what a killed step left
            )
        os.close(events_end)
        os.close(life)
        events_end = life = -1
        last: dict[str, Any] = {}
        for event in _lines(events, silence_limit()):
            if event.get("event") in ("progress", "note"):
                on_event(event)
            else:
                last = event
        process.wait()
    finally:
        for descriptor in (events, events_end, life, life_end):
            if descriptor != -1:
                os.close(descriptor)  # the end of `life_end` is what kills the step, if it still runs
        if process is not None:
            _reap(process)
    if last.get("event") == "done":
        with contextlib.suppress(OSError):
            if log.stat().st_size == 0:
                log.unlink()
        return last
    raise _failure(last, process.returncode, log)


def _environment() -> dict[str, str]:
    """This process's, such that the child finds this very mlcbuild, and iterates over sets in the same order always."""
    given, here = os.environ.get("PYTHONPATH", ""), Path(mlcbuild.__file__).parents[1]
    # Where packages are installed the child looks anyway; putting that in front would hide the standard library.
    paths = [given] if here.name in ("site-packages", "dist-packages") else [str(here), given]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONHASHSEED": "0"}


def _lines(events: int, patience: float) -> Iterator[dict[str, Any]]:
    """The JSON objects that arrive, until every writer is gone. Half a line of a killed writer is passed over.

    Raises StepFailed where nothing has arrived for so many seconds.
    """
    rest = b""
    while True:
        if not select.select([events], [], [], patience)[0]:
            raise StepFailed(
                f"it gave no sign of life for {duration(patience)} and was stopped: it hangs, or this machine is too "
                "slow for it (MLCBUILD_STEP_SILENCE=MINUTES waits longer)"
            )
        chunk = os.read(events, 1 << 16)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event


def _reap(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _failure(last: Mapping[str, Any], code: int, log: Path) -> StepFailed:
    if last.get("event") == "failed":
        return StepFailed(f"{last['text']}\nThe whole log: {log}" if last.get("logged") else last["text"])
    if last.get("event") == "broke":
        return StepBroke(f"{last['text']}\nThis is a bug in the step, not in the recipe. The whole log: {log}")
    if last.get("event") == "died":
        return StepBroke(f"killed by {_signal_name(last['signal'])}{_hint(last['signal'])}. Its log: {log}")
    if code is not None and code < 0:  # the process that watches the step was killed itself
        return StepBroke(f"killed by {_signal_name(-code)}{_hint(-code)}. Its log: {log}")
    return StepBroke(f"its process ended without a result (exit status {code}). Its log: {log}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _hint(number: int) -> str:
    hints: dict[int, str] = {
        signal.SIGKILL: " (by somebody, or by the kernel because memory ran out)",
        signal.SIGSEGV: " (a crash in native code)",
        signal.SIGABRT: " (native code gave up)",
        signal.SIGILL: " (native code uses an instruction that this CPU lacks)",
    }
    return hints.get(number, "")
