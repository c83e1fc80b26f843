"""The console: on a terminal a line per running step with bytes, rate and time left, elsewhere plain lines.

Steps report from threads of their own, several in the same instant. There is one board and one display of it, and
whoever reports holds the lock; finished steps scroll away above the display.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from mlcbuild.reporting import events
from mlcbuild.reporting.events import Event, Report
from mlcbuild.text import amount

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_INSTALL = "build:"  # packages are put into dist/ without a start being told
_ROWS = 20  # of the table at the end, at most
_REDRAWN_EVERY = 0.125  # seconds
_PROGRESS_EVERY = 10.0  # seconds: a log needs signs of life, not a film
_STYLES = {"ok": "green", "--": "dim", "!!": "bold red", "??": "yellow"}
_SHOWN_AS_BARS = events.StepStarted | events.StepProgress | events.StepNote | events.StepWaiting


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
    ended: bool = False
    installed: list[events.PackageInstalled] = field(default_factory=list)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        for name, step in list(self.steps.items()):  # drawn by a thread of its own
            bar = ProgressBar(step.total or None, step.done, width=24, pulse=not step.total)
            table.add_row(Text(name, "bold"), bar, Text(facts(step, time.monotonic())))
        return Group(table, Text(f"{self.built} built, {self.hits} from the cache", "dim"))


def screen(stream: TextIO) -> Report:
    """A report for `stream`. In a forked process, and once the build is over, it writes plain lines."""
    plainly = plain(stream)
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return plainly
    board, lock, owner = _Board(), threading.Lock(), os.getpid()
    display: Live | None = None

    def report(event: Event) -> None:
        nonlocal display
        if os.getpid() != owner:
            plainly(event)
            return
        with lock:
            update(board, event)
            if display is None and board.steps and not board.ended:
                display = _start(board, stream, lock)
            if display is None:
                plainly(event)
                return
            if board.ended:
                display.stop()  # nothing happens if it has been stopped
                if board.installed:
                    display.console.print(_packages(board.installed))
                    board.installed.clear()
            text = "" if isinstance(event, _SHOWN_AS_BARS) else line(event)
            if text:
                display.console.print(text, style=_STYLES.get(text[:2], ""))

    return report


def _packages(installed: Sequence[events.PackageInstalled]) -> RenderableType:
    """What the run made, as a table, and what to do with it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(*("package", "size", "KL", "library executed"), box=None, padding=(0, 2, 0, 0), header_style="dim")
    for each in installed[:_ROWS]:
        kl = "" if each.kl is None else f"{each.kl:.4f}"
        table.add_row(Text(each.folder), amount(each.size), kl, Text(each.executed))
    more = [Text(f"and {len(installed) - _ROWS} more")] if len(installed) > _ROWS else []
    runs = next((each.folder for each in installed if each.executed == "yes" and each.kl is not None), None)
    return Group(table, *more, *([Text(f"try it: mlcbuild chat {runs}")] if runs else []))


def _start(board: _Board, stream: TextIO, lock: threading.Lock) -> Live:
    """The display. Loading it takes a tenth of a second, which a build with nothing to do saves.

    It is drawn anew by a thread that holds `lock`, not by rich's own: between the place where rich begins to draw and
    what it draws there, that one may draw a board of another height, whose bars then stay.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    display = Live(board, console=console, auto_refresh=False, transient=True, redirect_stderr=False)
    display.start()
    atexit.register(display.stop)  # or a build that is broken off would leave its bars, and no cursor

    def redraw() -> None:
        while display.is_started:
            time.sleep(_REDRAWN_EVERY)
            with lock:
                if display.is_started:
                    display.refresh()

    threading.Thread(target=redraw, daemon=True).start()
    return display


def update(board: _Board, event: Event) -> None:
    """Bring the board up to date."""
    match event:
        case events.StepStarted(step):
            board.steps[step] = _Running(time.monotonic())
        case events.StepWaiting(step):
            board.steps[step] = _Running(time.monotonic(), note="another process is building it")
        case events.StepProgress(step, done, total, unit) if step in board.steps or step.startswith(_INSTALL):
            running = board.steps.setdefault(step, _Running(time.monotonic()))
            running.done, running.total, running.unit = done, total, unit
        case events.StepNote(step, text) if step in board.steps:
            board.steps[step].note = text
        case events.StepFinished(step, _, outcome):
            board.steps.pop(step, None)
            board.built += outcome == "built"
            board.hits += outcome == "hit"
        case events.PackageInstalled(recipe, _, outcome):
            board.steps.pop(f"{_INSTALL}{recipe}", None)
            board.hits += outcome == "hit"
            if outcome == "installed":
                board.installed.append(event)
        case events.RunFinished():
            board.steps.clear()
            board.ended = True


def facts(step: _Running, now: float) -> str:
    """`12.0 MB of 40.0 MB, 6.0 MB/s, 5 s left`."""
    seconds = now - step.started
    if not step.total:
        return f"{seconds:.0f} s  {step.note}".rstrip()
    rate = step.done / seconds if seconds > 0 else 0.0
    left = f", {(step.total - step.done) / rate:.0f} s left" if rate > 0 else ""
    return f"{amount(step.done, step.unit)} of {amount(step.total, step.unit)}, {amount(rate, step.unit)}/s{left}"


def plain(stream: TextIO) -> Report:
    """A report that writes to `stream`."""
    shown: dict[str, float] = {}

    def report(event: Event) -> None:
        if isinstance(event, events.StepStarted):
            shown[event.step] = time.monotonic()
        if isinstance(event, events.StepProgress):
            now = time.monotonic()
            if now - shown.setdefault(event.step, now) < _PROGRESS_EVERY:
                return
            shown[event.step] = now
        text = line(event)
        if text:
            stream.write(f"{text}\n")
            stream.flush()

    return report


def line(event: Event) -> str:
    """The event in words; empty for those that need none."""
    match event:
        case events.StepStarted(step):
            return f".. {step}"
        case events.StepWaiting(step):
            return f".. {step}: another process is building it; waiting"
        case events.StepProgress(step, done, total, unit):
            return f".. {step}: {amount(done, unit)} of {amount(total, unit)}"
        case events.StepNote(step, text):
            return f".. {step}: {text}"
        case events.StepFinished(step, _, "hit"):
            return f"-- {step}"
        case events.StepFinished(step, _, "built", seconds, size):
            return f"ok {step}  {seconds:.1f} s, {amount(size)}"
        case events.StepFinished(step, _, "failed", seconds):  # whoever catches the error shows its text
            return f"!! {step}  failed after {seconds:.1f} s"
        case events.PackageInstalled(recipe, _, "hit"):
            return f"-- build:{recipe}"
        case events.PackageInstalled(recipe, folder, _, size):
            return f"ok build:{recipe}  {folder}, {amount(size)}"
        case events.ModelLocked(model, commit):
            return f"ok {model}: locked at commit {commit} in recipes/recipes.lock"
        case events.RecipeUnavailable(recipe, text):
            return f"?? {recipe}: unavailable: {text}"
        case events.RunFinished(seconds, built, hit, failed, skipped):
            wrong = f", {failed} failed, {skipped} not tried" if failed else ""
            return f"{built} done, {hit} up to date{wrong}; {seconds:.1f} s"
    return ""
