"""Events as plain lines, one each: for files, pipes and dumb terminals."""

from __future__ import annotations

import time
from typing import TextIO

from mlcbuild.reporting import events
from mlcbuild.reporting.events import Event, Report
from mlcbuild.text import amount

_PROGRESS_EVERY = 10.0  # seconds: a log needs signs of life, not a film


def plain(stream: TextIO) -> Report:
    """A report that writes to `stream`."""
    shown: dict[str, float] = {}

    def report(event: Event) -> None:
        if isinstance(event, events.StepStarted):
            shown[event.step] = time.monotonic()
        if isinstance(event, events.StepProgress):
            now = time.monotonic()
            if now - shown.get(event.step, now) < _PROGRESS_EVERY:
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
