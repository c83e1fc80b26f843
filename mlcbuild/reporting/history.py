"""JSON logs read back: what became of every recipe, run by run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlcbuild.errors import MlcBuildError
from mlcbuild.reporting.events import (
    Event,
    PackageInstalled,
    RecipePlanned,
    RecipeUnavailable,
    RunFinished,
    StepFinished,
    from_json,
)

STATUSES = ("failed", "not tried", "unavailable", "built", "hit")  # the worst first


@dataclass(frozen=True)
class Cell:
    """One recipe in one run."""

    recipe: str
    model: str
    quantization: str
    target: str
    status: str  # one of STATUSES
    seconds: float = 0.0  # of the steps that ran for it, shared ones included
    size: int = 0  # bytes of the package
    kl: float | None = None
    quality: str = ""  # status of the quality report
    executed: str = ""  # what ran the library before it was shipped
    why: tuple[str, ...] = ()  # why steps ran
    failure: str = ""
    log: str = ""
    steps: tuple[StepFinished, ...] = ()  # those that were looked at, in the order of the plan


@dataclass(frozen=True)
class Run:
    """One build."""

    time: float  # when it ended, seconds since 1970
    cells: Sequence[Cell]
    seconds: float = 0.0
    built: int = 0
    hit: int = 0
    failed: int = 0
    skipped: int = 0
    ended: bool = True  # False: the log ends before the build does
    kinds: Mapping[str, float] = field(default_factory=dict)  # seconds of the steps that ran, by their kind

    def count(self, status: str) -> int:
        return sum(cell.status == status for cell in self.cells)

    @property
    def counts(self) -> str:
        """`1 failed, 3 built`."""
        return ", ".join(f"{self.count(status)} {status}" for status in STATUSES if self.count(status))


@dataclass
class _Reading:
    """What is known of a run so far."""

    planned: dict[str, RecipePlanned] = field(default_factory=dict)
    steps: dict[str, StepFinished] = field(default_factory=dict)
    packages: dict[str, PackageInstalled] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


def read_logs(paths: Iterable[Path]) -> list[Run]:
    """The runs in these logs, the earliest first. Raises MlcBuildError where a file is no log of a build."""
    runs = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise MlcBuildError(f"{path}: not UTF-8 text (byte {error.start}): no JSON log of a build") from None
        except OSError as error:
            raise MlcBuildError(f"{path}: cannot be read: {error.strerror}") from None
        runs += runs_of(_events(path, lines))
    if not runs:
        raise MlcBuildError("there is no build in these logs; `doit build log_json=FILE` writes one")
    return sorted(runs, key=lambda run: run.time)


def runs_of(events: Iterable[tuple[float, Event]]) -> list[Run]:
    """The runs that these events tell of; with each comes its time, in seconds since 1970."""
    runs, now, when = [], _Reading(), 0.0
    for when, event in events:
        match event:
            case RecipePlanned(recipe):
                now.planned[recipe] = event
            case StepFinished(step):
                # A step that ran is looked at again by what needs it; that it ran is what counts.
                if step not in now.steps or now.steps[step].outcome == "hit":
                    now.steps[step] = event
            case PackageInstalled(recipe):
                now.packages[recipe] = event
            case RecipeUnavailable(recipe, text):
                now.unavailable[recipe] = text
            case RunFinished():
                runs.append(Run(when, _cells(now), **vars(event), kinds=_kinds(now)))
                now = _Reading()
    if now.steps or now.packages:
        runs.append(Run(when, _cells(now), ended=False, kinds=_kinds(now)))
    return runs


def _events(path: Path, lines: Sequence[str]) -> Iterator[tuple[float, Event]]:
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            event, when = from_json(record), float(record.get("time", 0.0))
            time.gmtime(when)
        except (ValueError, TypeError, OverflowError, OSError, RecursionError):
            if number == len(lines):
                return  # a build that is being written, or was killed
            raise MlcBuildError(f"{path}:{number}: not a line of a build's JSON log") from None
        if event is not None:
            yield when, event


def _kinds(now: _Reading) -> dict[str, float]:
    ran = [step for step in now.steps.values() if step.outcome != "hit" and step.seconds]
    return {kind: sum(step.seconds for step in ran if step.kind == kind) for kind in sorted({s.kind for s in ran})}


def _cells(now: _Reading) -> list[Cell]:
    return [_cell(name, now) for name in sorted({*now.planned, *now.packages, *now.unavailable})]


def _cell(name: str, now: _Reading) -> Cell:
    known = now.planned.get(name, RecipePlanned(name, name, "", "", ()))
    package = now.packages.get(name)
    steps = [now.steps[step] for step in (*known.steps, f"build:{name}", f"publish:{name}") if step in now.steps]
    ran = [step for step in steps if step.outcome == "built" and step.kind != "publish"]
    failures = [step for step in steps if step.outcome == "failed"]
    if package is not None and not failures:
        status = "built" if package.outcome == "installed" or ran else "hit"
    elif name in now.unavailable:
        status = "unavailable"
    else:
        status = "failed" if failures else "not tried"
    reasons = dict.fromkeys(line for step in ran + failures for line in step.why.splitlines())
    return Cell(
        name,
        known.model,
        known.quantization,
        known.target,
        status,
        seconds=sum(step.seconds for step in ran + failures),
        size=package.size if package else 0,
        kl=package.kl if package and package.kl is not None and math.isfinite(package.kl) else None,
        quality=package.status if package else "",
        executed=package.executed if package else "",
        why=tuple(reason for reason in reasons if "has to run first" not in reason),
        failure="\n".join(step.text for step in failures) or now.unavailable.get(name, ""),
        log="\n".join(step.log for step in failures if step.log),
        steps=tuple(steps),
    )
