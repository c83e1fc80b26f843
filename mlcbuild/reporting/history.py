"""JSON logs read back: what became of every recipe, run by run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlcbuild.errors import MlcBuildError

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
    why: tuple[str, ...] = ()  # why steps ran
    failure: str = ""
    log: str = ""


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

    def count(self, status: str) -> int:
        return sum(cell.status == status for cell in self.cells)

    @property
    def counts(self) -> str:
        """`1 failed, 3 built`."""
        return ", ".join(f"{self.count(status)} {status}" for status in STATUSES if self.count(status))


@dataclass
class _Reading:
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    packages: dict[str, dict[str, Any]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    time: float = 0.0


def read_logs(paths: Iterable[Path]) -> list[Run]:
    """The runs in these logs, the earliest first. Raises MlcBuildError where a file is no log of a build."""
    runs = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MlcBuildError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        runs += runs_of(_events(path, lines))
    if not runs:
        raise MlcBuildError("there is no build in these logs; `doit build log_json=FILE` writes one")
    return sorted(runs, key=lambda run: run.time)


def runs_of(events: Iterable[Mapping[str, Any]]) -> list[Run]:
    """The runs that these events (`to_json`, with `time`) tell of."""
    runs, now = [], _Reading()
    for event in events:
        now.time = event.get("time", 0.0)
        match event.get("event"):
            case "recipe_planned":
                now.recipes[event["recipe"]] = dict(event)
            case "step_finished":
                # A step that ran is looked at again by what needs it; that it ran is what counts.
                if now.steps.get(event["step"], {}).get("outcome") not in ("built", "failed"):
                    now.steps[event["step"]] = dict(event)
            case "package_installed":
                now.packages[event["recipe"]] = dict(event)
            case "recipe_unavailable":
                now.unavailable[event["recipe"]] = event["text"]
            case "run_finished":
                counts = {name: event[name] for name in ("seconds", "built", "hit", "failed", "skipped")}
                runs.append(Run(now.time, _cells(now), **counts))
                now = _Reading()
    if now.steps or now.packages:
        runs.append(Run(now.time, _cells(now), ended=False))
    return runs


def _events(path: Path, lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            event["event"]
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                return  # a build that is being written, or was killed
            raise MlcBuildError(f"{path}:{number}: not a line of a build's JSON log") from None
        yield event


def _cells(now: _Reading) -> list[Cell]:
    names = dict.fromkeys([*now.recipes, *now.packages, *now.unavailable])
    return [_cell(name, now) for name in sorted(names)]


def _cell(name: str, now: _Reading) -> Cell:
    known = now.recipes.get(name, {})
    package = now.packages.get(name)
    steps = [
        now.steps[step] for step in (*known.get("steps", ()), f"build:{name}", f"publish:{name}") if step in now.steps
    ]
    ran = [step for step in steps if step["outcome"] == "built" and step["kind"] != "publish"]
    failures = [step for step in steps if step["outcome"] == "failed"]
    if package is not None and not failures:
        status = "built" if package["outcome"] == "installed" or ran else "hit"
    elif name in now.unavailable:
        status = "unavailable"
    else:
        status = "failed" if failures else "not tried"
    reasons = dict.fromkeys(line for step in ran + failures for line in step.get("why", "").splitlines())
    package = package or {}
    return Cell(
        name,
        known.get("model", name),
        known.get("quantization", ""),
        known.get("target", ""),
        status,
        seconds=sum(step["seconds"] for step in ran + failures),
        size=package.get("size", 0),
        kl=package.get("kl"),
        quality=package.get("status", ""),
        why=tuple(reason for reason in reasons if "has to run first" not in reason),
        failure="\n".join(step["text"] for step in failures) or now.unavailable.get(name, ""),
        log="\n".join(step["log"] for step in failures if step.get("log")),
    )
