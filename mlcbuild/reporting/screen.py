"""The console's choice: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import threading
from typing import TextIO

from mlcbuild.reporting.events import Event, Report, StepStarted, StepWaiting
from mlcbuild.reporting.plain import plain


def screen(stream: TextIO) -> Report:
    """A report for `stream`."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return plain(stream)
    current, drawing = plain(stream), False
    lock = threading.Lock()  # steps that start together must not open a display each

    def report(event: Event) -> None:
        nonlocal current, drawing
        if not drawing and isinstance(event, StepStarted | StepWaiting):
            with lock:
                if not drawing:
                    from mlcbuild.reporting.live import live  # a tenth of a second: a build with nothing to do saves it

                    current, drawing = live(stream), True
        current(event)

    return report
