"""What a build would take: which steps are cached, which would run, with bytes and seconds judged by past runs."""

from __future__ import annotations

import bisect
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.cache.action import Damaged, record_of
from mlcbuild.cache.layout import action_files
from mlcbuild.cache.store import Store, total_size
from mlcbuild.cache.tree import canonical, digest_json, matches
from mlcbuild.engine.graph import Graph, Step
from mlcbuild.errors import MlcBuildError
from mlcbuild.regular import read_regular
from mlcbuild.text import amount
from mlcbuild.workspace.session import Session


@dataclass(frozen=True)
class StepEstimate:
    """One step. `size` (bytes of its artifact), `new` (those that are not in the cache yet) and `seconds` are known of
    a cached step and estimated for another; None: nothing to judge by."""

    name: str
    kind: str
    cached: bool
    size: int | None
    new: int | None
    seconds: float | None


@dataclass(frozen=True)
class BuildEstimate:
    """All steps that are wanted, each once, in running order, and what they are shared by."""

    steps: Sequence[StepEstimate]
    recipes: Sequence[str]
    to_install: Sequence[str]
    unavailable: Mapping[str, str]
    libraries: int
    weights: int
    new: int  # bytes that the disk of the cache has to hold in addition
    free: int
    unlocked: Mapping[str, str]

    @property
    def to_run(self) -> list[StepEstimate]:
        return [step for step in self.steps if not step.cached]

    @property
    def seconds(self) -> float:
        """Estimated seconds of the steps that would run, one after another."""
        return sum(step.seconds or 0.0 for step in self.to_run)

    @property
    def unknown(self) -> int:
        """How many of the steps to run there is nothing to judge by for."""
        return sum(step.seconds is None for step in self.to_run)


@dataclass(frozen=True)
class _Past:
    """A recorded action: `mass` is the bytes of everything that went into it, directly or not."""

    mass: int
    size: int
    seconds: float


_QUANTIZED = re.compile(r"(?:^|[-._/])(?:I?Q|TQ)([1-8])_", re.IGNORECASE)  # Q4_K_M of a GGUF file's name

# By kind of step and by format (as text; None: all of them): the recorded actions, the smallest mass first.
_Runs = Mapping[tuple[str, str | None], Sequence[_Past]]


def estimate(session: Session, names: Iterable[str] | None = None) -> BuildEstimate:
    """What bringing the steps called `names` (None: every recipe's) up to date would do. Nothing is built.

    Raises MlcBuildError when an input outside the cache cannot be read.
    """
    with session.lookup.at_once():
        return _estimate(session, names)


def _estimate(session: Session, names: Iterable[str] | None) -> BuildEstimate:
    graph, lookup = session.graph, session.lookup
    every = (name for goal in graph.goals.values() for name in goal.steps.values())
    wanted = graph.closure(every if names is None else names)
    missing = [name for name in wanted if lookup.find(name) is None]
    past = _past(session.store, graph) if missing else {}
    sizes: dict[str, int] = {}
    steps = []
    for name in wanted:
        steps.append(_estimated(session, graph.steps[name], past, sizes))
        sizes[name] = steps[-1].size or 0
    goals = graph.goals
    to_install = [name for name in goals if not session.is_installed(name)]
    new = sum(step.new or 0 for step in steps if not step.cached)
    if not _same_disk(session.store.root, session.dist):
        new += sum(sizes.get(goals[name].steps["package"], 0) for name in to_install)
    return BuildEstimate(
        steps,
        list(goals),
        to_install,
        graph.unavailable,
        libraries=len({goal.steps["library"] for goal in goals.values()}),
        weights=len({goal.steps["quantize"] for goal in goals.values()}),
        new=new,
        free=shutil.disk_usage(session.store.root).free,
        unlocked=graph.unlocked,
    )


def check_room(coming: BuildEstimate, folder: Path) -> None:
    """Raises MlcBuildError where the steps to run are estimated to need more than the disk of `folder` has free."""
    if coming.new > coming.free:
        raise MlcBuildError(
            f"{folder}: the {len(coming.to_run)} steps to run are estimated to need {amount(coming.new)}, and "
            f"{amount(coming.free)} are free: nothing was started. Free some space, put the cache elsewhere "
            "(cache=DIR), or build fewer recipes at a time; `mlcbuild plan` shows what needs how much"
        )


def _estimated(session: Session, step: Step, past: _Runs, sizes: Mapping[str, int]) -> StepEstimate:
    """The step, after everything that it needs (`sizes`)."""
    action = session.lookup.known(step.name)
    if action is not None:
        return StepEstimate(step.name, step.kind, True, total_size(action.tree.files.values()), 0, action.seconds)
    # A GGUF file is counted once: `unpack` passes on what `download` has.
    others = (name for name in session.graph.closure([step.name]) if name != step.name)
    mass = sum(sizes[name] for name in others if not name.startswith("unpack:"))
    nearest = _nearest(past, step, mass)
    size, seconds = _first_guess(session.graph, step, sizes), None
    if nearest is not None:
        # Work and results grow with what goes in; where nothing does (lower), they stay what they were.
        factor = mass / nearest.mass if nearest.mass and mass else 1.0
        size, seconds = round(nearest.size * factor), nearest.seconds * factor
    new = size
    if step.kind == "download":
        size = new = _download_bytes(step)
        if any(item.path is not None for item in step.inputs):
            new = 0  # borrowed where it lies
    elif step.kind == "unpack":
        size, new = mass, 0  # the file, passed on, with a few small ones
    elif step.kind == "package" and size is not None:  # weights and library are passed on, not copied
        new = max(
            0, size - sum(sizes[name] for name in step.producers if not name.startswith(("download:", "unpack:")))
        )
    return StepEstimate(step.name, step.kind, False, size, new, seconds)


def _first_guess(graph: Graph, step: Step, sizes: Mapping[str, int]) -> int | None:
    """Bytes of weights of a kind that was never made: checkpoints mostly have 16 bits per number.

    A GGUF file has what its name says; of fewer than 16, `convert` makes 32.
    """
    if step.kind not in ("convert", "quantize"):
        return None
    fetched = [name for name in graph.closure([step.name]) if graph.steps[name].kind == "download"]
    numbers = sum(sizes[name] / _stored_bits(graph.steps[name]) for name in fetched)
    if step.kind == "convert":
        packed = any(_stored_bits(graph.steps[name]) < 16 for name in fetched)
        return round(numbers * 32) if packed else None
    quantization = step.fields["quantization"]

    def bits(weights: Mapping[str, Any] | None) -> float:
        return weights["bits"] + 1 if weights else 32 if quantization.get("model_dtype") == "float32" else 16

    wanted = bits(quantization.get("weights"))
    for item in step.inputs:
        if item.name == "budget" and item.step:
            budget = graph.steps[item.step].fields
            wanted = min(budget["bits_per_weight"], max(bits(weights) for _, weights in budget["formats"]))
    return round(numbers * wanted)


def _stored_bits(step: Step) -> float:
    """Bits of a number in what a step downloads; with the scales of blocks, of which a GGUF file has many kinds."""
    names = (*step.fields.get("files", ()), *(item.name for item in step.inputs))
    found = next((found for name in names if name.endswith(".gguf") and (found := _QUANTIZED.search(name))), None)
    return int(found[1]) + 0.75 if found else 16


def _download_bytes(step: Step) -> int:
    """Of a repository's files, as they are locked, or of a local checkpoint's."""
    total: int = sum(file["size"] for file in step.fields.get("files", {}).values())
    for item in step.inputs:
        if item.path is not None and item.path.is_file():
            total += item.path.stat().st_size
        elif item.path is not None and item.path.is_dir():
            files = (path for path in item.path.iterdir() if path.is_file())
            total += sum(path.stat().st_size for path in files if not item.select or matches(path.name, item.select))
    return total


def _nearest(past: _Runs, step: Step, mass: int) -> _Past | None:
    """The past run that is least unlike the step: of the same format where there is one, then of the nearest size."""
    format_ = canonical(step.fields.get("quantization")).decode()
    runs = past.get((step.kind, format_)) or past.get((step.kind, None), ())
    at = bisect.bisect_left(runs, mass, key=lambda each: each.mass)
    beside = runs[max(0, at - 1) : at + 1]
    return min(beside, key=lambda each: abs(math.log((mass + 1) / (each.mass + 1))), default=None)


def _past(store: Store, graph: Graph) -> _Runs:
    """The recorded actions, each entry read once."""
    records = [record for path in action_files(store.root) if (record := _read(path)) is not None]
    makers = {record["tree"]: record for record in records}
    # An input may be a part of what a step made: by the patterns that steps of today select with.
    parts = {item.select for step in graph.steps.values() for item in step.inputs if item.step and item.select}
    for record in records:
        for patterns in parts:
            chosen = {name: file for name, file in record["files"].items() if matches(name, patterns)}
            if chosen:
                makers.setdefault(digest_json(chosen), record)
    past: dict[tuple[str, str | None], list[_Past]] = {}
    for record in records:
        mass = sum(_size(maker) for maker in _ancestry(record, makers) if maker["step"] != "unpack")
        format_ = canonical(record["fields"].get("quantization")).decode()
        for of in (format_, None):
            past.setdefault((record["step"], of), []).append(_Past(mass, _size(record), record["seconds"]))
    for runs in past.values():
        runs.sort(key=lambda each: each.mass)
    return past


def _ancestry(record: Mapping[str, Any], makers: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    waiting = list(record["inputs"].values())
    while waiting:
        maker = makers.get(waiting.pop())
        if maker is not None and maker["tree"] not in found:
            found[maker["tree"]] = maker
            waiting += maker["inputs"].values()
    return list(found.values())


def _size(record: Mapping[str, Any]) -> int:
    return sum(size for _, size, _ in record["files"].values())


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return record_of(read_regular(path))
    except (OSError, Damaged):
        return None


def _same_disk(one: Path, other: Path) -> bool:
    while not other.exists():
        other = other.parent
    return one.stat().st_dev == other.stat().st_dev
