"""Live bars on a terminal: a line per running step with bytes, rate and time left; finished ones scroll away above."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlcbuild.reporting.events import (
    Event,
    PackageInstalled,
    Report,
    RunFinished,
    StepFinished,
    StepNote,
    StepProgress,
    StepStarted,
    StepWaiting,
)
from mlcbuild.reporting.plain import amount, line, plain

_STYLES = {"ok": "green", "--": "dim", "!!": "bold red", "??": "yellow"}


@dataclass
class _Running:
    started: float
    done: int = 0
    total: int = 0
    unit: str = "bytes"
    note: str = ""


@dataclass
class _Board:
    """What is on the screen now."""

    steps: dict[str, _Running] = field(default_factory=dict)
    built: int = 0
    hits: int = 0

    def __rich__(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        for name, step in self.steps.items():
            bar: RenderableType = ProgressBar(step.total or None, step.done, width=24, pulse=not step.total)
            table.add_row(Text(name, "bold"), bar, Text(facts(step, time.monotonic())))
        return Group(table, Text(f"{self.built} built, {self.hits} from the cache", "dim"))


def live(stream: TextIO) -> Report:
    """A report that draws on a terminal. In a forked process it writes plain lines instead."""
    board, lock, owner = _Board(), threading.Lock(), os.getpid()
    console = Console(file=stream, highlight=False)
    display = Live(board, console=console, refresh_per_second=8, transient=True, redirect_stderr=False)
    plainly = plain(stream)

    def report(event: Event) -> None:
        if os.getpid() != owner:
            plainly(event)
            return
        with lock:
            if update(board, event):
                display.start()  # nothing happens if it has been started
            text = "" if isinstance(event, StepStarted | StepProgress | StepNote | StepWaiting) else line(event)
            if isinstance(event, RunFinished):
                display.stop()
            if text:
                console.print(Text(text, _STYLES.get(text[:2], "")))

    return report


def update(board: _Board, event: Event) -> bool:
    """Bring the board up to date; whether anything is running."""
    match event:
        case StepStarted(step):
            board.steps[step] = _Running(time.monotonic())
        case StepWaiting(step):
            board.steps[step] = _Running(time.monotonic(), note="another process is building it")
        case StepProgress(step, done, total, unit) if step in board.steps:
            running = board.steps[step]
            running.done, running.total, running.unit = done, total, unit
        case StepNote(step, text) if step in board.steps:
            board.steps[step].note = text
        case StepFinished(step, _, outcome):
            board.steps.pop(step, None)
            board.built += outcome == "built"
            board.hits += outcome == "hit"
        case PackageInstalled(_, _, "hit"):
            board.hits += 1
    return bool(board.steps)


def facts(step: _Running, now: float) -> str:
    """`12.0 MB of 40.0 MB, 6.0 MB/s, 5 s left`."""
    seconds = now - step.started
    if not step.total:
        return f"{seconds:.0f} s  {step.note}".rstrip()
    rate = step.done / seconds if seconds > 0 else 0.0
    left = f", {(step.total - step.done) / rate:.0f} s left" if rate > 0 else ""
    return f"{amount(step.done, step.unit)} of {amount(step.total, step.unit)}, {amount(rate, step.unit)}/s{left}"
