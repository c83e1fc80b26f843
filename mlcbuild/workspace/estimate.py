"""What a build would do: which steps are cached, which would run, and what that would take, judged by past runs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.cache.layout import action_files
from mlcbuild.cache.store import Store, total_size
from mlcbuild.cache.tree import canonical, digest_json, matches
from mlcbuild.engine.graph import Graph, Step
from mlcbuild.errors import MlcBuildError
from mlcbuild.reporting.plain import amount
from mlcbuild.workspace.session import Session

_SHOWN = 40  # steps that are listed one by one


@dataclass(frozen=True)
class Planned:
    """One step. `size` (bytes of its artifact), `new` (those that are not in the cache yet) and `seconds` are known of
    a cached step and estimated for another; None: nothing to judge by."""

    name: str
    kind: str
    cached: bool
    size: int | None
    new: int | None
    seconds: float | None


@dataclass(frozen=True)
class Preview:
    """All steps that are wanted, each once, in running order, and what they are shared by."""

    steps: Sequence[Planned]
    recipes: Sequence[str]
    to_install: Sequence[str]
    unavailable: Mapping[str, str]
    libraries: int
    weights: int
    new: int  # bytes that the disk of the cache has to hold in addition
    free: int
    unlocked: Mapping[str, str]

    @property
    def to_run(self) -> list[Planned]:
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
    quantization: Any


def preview(session: Session, names: Iterable[str] | None = None) -> Preview:
    """What bringing the steps called `names` (None: every recipe's) up to date would do. Nothing is built.

    Raises MlcBuildError when an input outside the cache cannot be read.
    """
    graph, lookup = session.graph, session.lookup
    wanted = graph.closure([name for goal in graph.goals.values() for name in goal.steps.values()])
    if names is not None:
        wanted = graph.closure(names)
    missing = [name for name in wanted if lookup.find(name) is None]
    past = _past(session.store, graph) if missing else {}
    sizes: dict[str, int] = {}
    steps = []
    for name in wanted:
        planned = _planned(session, graph.steps[name], past, sizes)
        sizes[name] = planned.size or 0
        steps.append(planned)
    goals = graph.goals
    to_install = [name for name in goals if not session.is_installed(name)]
    new = sum(step.new or 0 for step in steps if not step.cached)
    if not _same_disk(session.store.root, session.dist):
        new += sum(sizes.get(goals[name].steps["package"], 0) for name in to_install)
    return Preview(
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


def check_room(plan: Preview, folder: Path) -> None:
    """Raises MlcBuildError where the steps to run are estimated to need more than the disk of `folder` has free."""
    if plan.new > plan.free:
        raise MlcBuildError(
            f"{folder}: the {len(plan.to_run)} steps to run are estimated to need {amount(plan.new)}, and "
            f"{amount(plan.free)} are free: nothing was started. Free some space, put the cache elsewhere (cache=DIR), "
            "or build fewer recipes at a time; `mlcbuild plan` shows what needs how much"
        )


def render(plan: Preview) -> str:
    """The preview as text."""
    run = plan.to_run
    lines = [
        f"recipes  {_count(len(plan.recipes), 'recipe')}, {len(plan.to_install)} to install",
        f"steps    {_count(len(plan.steps), 'step')}, each once: "
        f"{len(plan.steps) - len(run)} cached, {len(run)} to run",
        f"shared   {_count(plan.libraries, 'library', 'libraries')} and {_count(plan.weights, 'set')} of weights "
        f"for {_count(len(plan.recipes), 'recipe')}",
        f"disk     {amount(plan.new)} estimated, {amount(plan.free)} free"
        + ("" if plan.new <= plan.free else ": NOT ENOUGH"),
        f"time     {duration(plan.seconds)} estimated, one step after another",
    ]
    if plan.unknown:
        lines.append(f"         ({_count(plan.unknown, 'step')} of a kind that never ran with this cache: not counted)")
    lines += [f"??       {name}: unavailable: {text}" for name, text in plan.unavailable.items()]
    if plan.unlocked:
        lines.append(f"??       {_count(len(plan.unlocked), 'recipe')} unknown until locked, in no figure above:")
        lines += [f"         {name}: {text}" for name, text in [*plan.unlocked.items()][:_SHOWN]]
        if len(plan.unlocked) > _SHOWN:
            lines.append(f"         … and {len(plan.unlocked) - _SHOWN} more")
    rows = [("kind", "steps", "cached", "to run", "new bytes", "time")]
    for kind in dict.fromkeys(step.kind for step in plan.steps):
        each = [step for step in plan.steps if step.kind == kind]
        todo = [step for step in each if not step.cached]
        facts = (
            (amount(sum(step.new or 0 for step in todo)), duration(sum(step.seconds or 0.0 for step in todo)))
            if todo
            else ("", "")
        )
        rows.append((kind, str(len(each)), str(len(each) - len(todo)), str(len(todo)), *facts))
    lines += ["", *_table(rows)]
    if run:
        listed = [(step.name, _about(step.new, amount), _about(step.seconds, duration)) for step in run[:_SHOWN]]
        lines += ["", *_table([("to run", "new bytes", "time"), *listed])]
        if len(run) > _SHOWN:
            lines.append(f"… and {len(run) - _SHOWN} more")
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    """`0.3 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _planned(session: Session, step: Step, past: Mapping[str, Sequence[_Past]], sizes: Mapping[str, int]) -> Planned:
    """The step, after everything that it needs (`sizes`)."""
    action = session.lookup.known(step.name)
    if action is not None:
        return Planned(step.name, step.kind, True, total_size(action.tree.files.values()), 0, action.seconds)
    needed = [name for name in session.graph.closure([step.name]) if name != step.name]
    outside = sum(_outside_bytes(step) for step in map(session.graph.steps.__getitem__, [*needed, step.name]))
    mass = sum(sizes[name] for name in needed)
    format_ = json.loads(canonical(step.fields.get("quantization")))  # as it is recorded: tuples are lists there
    nearest = min(past.get(step.kind, ()), key=lambda each: _distance(each, format_, mass), default=None)
    size, seconds = _first_guess(step, mass), None
    if nearest is not None:
        # Work and results grow with what goes in; where nothing does (lower), they stay what they were.
        factor = mass / nearest.mass if nearest.mass and mass else 1.0
        size, seconds = round(nearest.size * factor), nearest.seconds * factor
    if step.kind == "download":
        size = _download_bytes(step, outside)
    new = size
    if any(item.path is not None for item in step.inputs) and step.kind == "download":
        new = 0  # borrowed where it lies
    elif step.kind == "package" and size is not None:  # weights and library are passed on, not copied
        new = max(0, size - sum(sizes[name] for name in step.producers if not name.startswith("download:")))
    return Planned(step.name, step.kind, False, size, new, seconds)


def _first_guess(step: Step, mass: int) -> int | None:
    """Bytes of weights of a kind that was never made: checkpoints mostly have 16 bits per number."""
    if step.kind != "quantize":
        return None
    weights = step.fields["quantization"].get("weights")
    dense = 32 if step.fields["quantization"].get("model_dtype") == "float32" else 16
    return round(mass * ((weights["bits"] + 1) if weights else dense) / 16)


def _download_bytes(step: Step, outside: int) -> int:
    files = step.fields.get("files", {})
    return sum(file["size"] for file in files.values()) if files else outside


def _outside_bytes(step: Step) -> int:
    """Of a local checkpoint."""
    total = 0
    for item in step.inputs:
        if item.path is not None and step.kind == "download" and item.path.is_dir():
            files = (path for path in item.path.iterdir() if path.is_file())
            total += sum(path.stat().st_size for path in files if not item.select or matches(path.name, item.select))
    return total


def _distance(past: _Past, quantization: Any, mass: int) -> tuple[bool, float]:
    """How unlike a past run is: another format, then another size."""
    return past.quantization != quantization, abs(math.log((mass + 1) / (past.mass + 1)))


def _past(store: Store, graph: Graph) -> dict[str, list[_Past]]:
    """The recorded actions by kind of step, each entry read once."""
    records = [record for path in action_files(store.root) if (record := _read(path)) is not None]
    makers = {record["tree"]: record for record in records}
    # An input may be a part of what a step made: by the patterns that steps of today select with.
    parts = {item.select for step in graph.steps.values() for item in step.inputs if item.step and item.select}
    for record in records:
        for patterns in parts:
            chosen = {name: file for name, file in record["files"].items() if matches(name, patterns)}
            if chosen:
                makers.setdefault(digest_json(chosen), record)
    past: dict[str, list[_Past]] = {}
    for record in records:
        mass = sum(_size(maker) for maker in _ancestry(record, makers))
        quantization = record["fields"].get("quantization")
        past.setdefault(record["step"], []).append(_Past(mass, _size(record), record["seconds"], quantization))
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
        record: dict[str, Any] = json.loads(path.read_bytes())
        whole = {"tree", "files", "step", "fields", "inputs", "seconds"} <= record.keys()
        return record if whole else None
    except (OSError, ValueError, AttributeError):
        return None


def _same_disk(one: Path, other: Path) -> bool:
    while not other.exists():
        other = other.parent
    return one.stat().st_dev == other.stat().st_dev


def _about(value: float | None, show: Any) -> str:
    return "unknown" if value is None else f"{show(value)}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
