"""The console's choice between live bars and plain lines."""

from __future__ import annotations

import io
import sys
import threading
import time
import types

import pytest

from mlcbuild.reporting.events import Event, StepStarted
from mlcbuild.reporting.screen import screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_steps_that_start_together_share_one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    drawn: list[str] = []

    def live(stream: object) -> object:
        opened.append("a display")
        time.sleep(0.05)  # as long as importing it takes: the others arrive meanwhile

        def draw(event: Event) -> None:
            assert isinstance(event, StepStarted)
            drawn.append(event.step)

        return draw

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setitem(sys.modules, "mlcbuild.reporting.live", types.SimpleNamespace(live=live))
    report = screen(Terminal())
    steps = [f"lower:{number}" for number in range(4)]
    threads = [threading.Thread(target=report, args=(StepStarted(step, "lower"),)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == ["a display"]
    assert sorted(drawn) == steps
