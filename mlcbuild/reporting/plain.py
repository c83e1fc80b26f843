"""Events as plain lines, one each: for files, pipes and dumb terminals."""

from __future__ import annotations

import time
from typing import TextIO

from mlcbuild.reporting.events import (
    Event,
    ModelLocked,
    PackageInstalled,
    RecipeUnavailable,
    Report,
    RunFinished,
    StepFinished,
    StepNote,
    StepProgress,
    StepStarted,
    StepWaiting,
)
from mlcbuild.text import amount

_PROGRESS_EVERY = 10.0  # seconds: a log needs signs of life, not a film


def plain(stream: TextIO) -> Report:
    """A report that writes to `stream`."""
    shown: dict[str, float] = {}

    def report(event: Event) -> None:
        if isinstance(event, StepStarted):
            shown[event.step] = time.monotonic()
        if isinstance(event, StepProgress):
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
        case StepStarted(step):
            return f".. {step}"
        case StepWaiting(step):
            return f".. {step}: another process is building it; waiting"
        case StepProgress(step, done, total, unit):
            return f".. {step}: {amount(done, unit)} of {amount(total, unit)}"
        case StepNote(step, text):
            return f".. {step}: {text}"
        case StepFinished(step, _, "hit"):
            return f"-- {step}"
        case StepFinished(step, _, "built", seconds, size):
            return f"ok {step}  {seconds:.1f} s, {amount(size)}"
        case StepFinished(step, _, "failed", seconds):  # whoever catches the error shows its text
            return f"!! {step}  failed after {seconds:.1f} s"
        case PackageInstalled(recipe, _, "hit"):
            return f"-- build:{recipe}"
        case PackageInstalled(recipe, folder, _, size):
            return f"ok build:{recipe}  {folder}, {amount(size)}"
        case ModelLocked(model, commit):
            return f"ok {model}: locked at commit {commit} in recipes/recipes.lock"
        case RecipeUnavailable(recipe, text):
            return f"?? {recipe}: unavailable: {text}"
        case RunFinished(seconds, built, hit, failed, skipped):
            wrong = f", {failed} failed, {skipped} not tried" if failed else ""
            return f"{built} done, {hit} up to date{wrong}; {seconds:.1f} s"
    return ""
