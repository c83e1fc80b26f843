"""What happens during a build, as data: printers and logs are functions of these."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mlcbuild.errors import MlcBuildError


@dataclass(frozen=True)
class StepStarted:
    step: str  # the task's name, `convert:stories`
    kind: str


@dataclass(frozen=True)
class StepWaiting:
    """Another process is running the same step; its result will be used."""

    step: str


@dataclass(frozen=True)
class StepProgress:
    step: str
    done: int
    total: int
    unit: str


@dataclass(frozen=True)
class StepNote:
    step: str
    text: str


@dataclass(frozen=True)
class StepFinished:
    step: str
    kind: str
    outcome: Literal["hit", "built", "failed"]
    seconds: float
    size: int  # bytes of the artifact
    text: str = ""  # why it failed
    why: str = ""  # why it had to run: a line for each thing that differs from the nearest earlier run
    log: str = ""  # of a failure: the last lines of the step's own output
    key: str = ""  # the digest of all that it depends on; of what failed, none


@dataclass(frozen=True)
class PackageInstalled:
    recipe: str
    folder: str
    outcome: Literal["hit", "installed"]
    size: int
    kl: float | None = None  # nats per token, from the quality report
    status: str = ""  # of the quality report
    executed: str = ""  # what ran the library before it was shipped, in words


@dataclass(frozen=True)
class RecipePlanned:
    """A recipe of this run, for logs and reports: the first thing that is said of it."""

    recipe: str
    model: str
    quantization: str
    target: str
    steps: tuple[str, ...]  # the tasks of everything that it needs


@dataclass(frozen=True)
class ModelLocked:
    """A hub model's commit was written to recipes.lock."""

    model: str
    commit: str


@dataclass(frozen=True)
class RecipeUnavailable:
    recipe: str
    text: str


@dataclass(frozen=True)
class RunFinished:
    """Counts are of tasks: steps and packages."""

    seconds: float
    built: int
    hit: int
    failed: int
    skipped: int  # not even tried, because something that they need failed


Event = (
    StepStarted
    | StepWaiting
    | StepProgress
    | StepNote
    | StepFinished
    | PackageInstalled
    | RecipePlanned
    | ModelLocked
    | RecipeUnavailable
    | RunFinished
)
Report = Callable[[Event], None]


_EVENTS = {re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower(): kind for kind in get_args(Event)}
_NAMES = {kind: name for name, kind in _EVENTS.items()}
_TYPES: dict[str, tuple[type, ...]] = {  # of fields, as JSON has them; others are strings
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "tuple[str, ...]": (list, tuple),
}


def to_json(event: Event) -> dict[str, Any]:
    """`{"event": "step_finished", "step": ...}`."""
    return {"event": _NAMES[type(event)], **dataclasses.asdict(event)}


def from_json(record: Any) -> Event | None:
    """The event; None for a kind that is not known here. Raises ValueError for what is none at all."""
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        raise ValueError("not an object with an event")
    kind = _EVENTS.get(record["event"])
    if kind is None:
        return None
    known = [field for field in dataclasses.fields(kind) if field.name in record]
    for field in known:
        if not isinstance(record[field.name], _TYPES.get(str(field.type), (str,))):
            raise ValueError(f"{field.name} is {record[field.name]!r}")
    try:
        event: Event = kind(**{field.name: record[field.name] for field in known})
    except TypeError as error:  # a field is missing
        raise ValueError(str(error)) from None
    return event


def json_log(path: Path) -> Report:
    """A report that appends one line per event, with `time` (seconds since 1970) in front.

    Each line is one write, so that several processes may share the file. Raises MlcBuildError when it cannot be opened,
    and the report when it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise MlcBuildError(f"{path}: the log cannot be written: {error.strerror}") from None

    def report(event: Event) -> None:
        line = json.dumps({"time": round(time.time(), 3), **to_json(event)})
        try:
            os.write(descriptor, line.encode() + b"\n")
        except OSError as error:
            raise MlcBuildError(f"{path}: the log cannot be written: {error.strerror}; it ends too early") from None

    return report
