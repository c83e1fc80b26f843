"""The console's choice: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
from typing import TextIO

from mlcbuild.reporting.events import Event, Report, StepStarted, StepWaiting
from mlcbuild.reporting.plain import plain


def screen(stream: TextIO) -> Report:
    """A report for `stream`."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return plain(stream)
    current, drawing = plain(stream), False

    def report(event: Event) -> None:
        nonlocal current, drawing
        if not drawing and isinstance(event, StepStarted | StepWaiting):
            from mlcbuild.reporting.live import live  # a tenth of a second that a build with nothing to do saves

            current, drawing = live(stream), True
        current(event)

    return report
