"""Why a step has to run: what differs from the nearest earlier action of its kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlcbuild.engine.graph import Step
from mlcbuild.engine.lookup import Lookup
from mlcbuild.errors import MlcBuildError

_MANY = 200  # recorded actions of a kind: with more, those under the step's own name are compared, or the latest
_WIDTH = 60  # characters of a value worth showing

Recorded = Callable[[str], Sequence[Mapping[str, Any]]]  # the recorded actions of a kind, the latest last


@dataclass(frozen=True)
class Answer:
    """`hit`, or the reasons why not."""

    step: str
    hit: bool
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{'hit ' if self.hit else 'miss'}  {self.step}", *(f"        {reason}" for reason in self.reasons)]
        return "\n".join(lines)


def why(lookup: Lookup, names: Iterable[str]) -> list[Answer]:
    """An answer for each of these steps and for everything that they need, in running order."""
    records: dict[str, list[dict[str, Any]]] = {}

    def recorded(kind: str) -> list[dict[str, Any]]:
        if kind not in records:
            records[kind] = list(lookup.store.recorded(kind))
        return records[kind]

    with lookup.at_once():
        return [_answer(lookup, name, recorded) for name in lookup.graph.closure(names)]


def _answer(lookup: Lookup, name: str, recorded: Recorded) -> Answer:
    step = lookup.graph.steps[name]
    try:
        if lookup.find(name) is not None:
            return Answer(name, True)
        ingredients = lookup.ingredients(name)
        now = _declared(lookup, step)
    except MlcBuildError as error:
        return Answer(name, False, (str(error),))
    waiting = [
        f"input {item.name}: {item.step} has to run first"
        for item in step.inputs
        if item.step is not None and lookup.find(item.step) is None
    ]
    if ingredients is not None:
        now["inputs"] = {name: tree.digest for name, tree in ingredients.inputs.items()}
    key = ingredients.key if ingredients is not None else None
    return Answer(name, False, tuple(waiting + _differences(recorded(step.kind), step, key, now, bool(waiting))))


def _declared(lookup: Lookup, step: Step) -> dict[str, Any]:
    """What is known of the step before its inputs are."""
    ingredients = lookup.declared(step)
    return {"code": ingredients.digest, "fields": step.fields, "toolchain": lookup.versions(step)}


def _differences(
    records: Sequence[Mapping[str, Any]], step: Step, key: str | None, now: Mapping[str, Any], waiting: bool
) -> list[str]:
    """How `now` differs from the recorded action that it differs least from."""
    if len(records) > _MANY:
        own = [record for record in records if record.get("name") == step.name or record["key"] == key]
        records = own or records[-_MANY:]
    best: tuple[tuple[int, bool], list[str]] | None = None
    for record in records:
        if record["key"] == key:
            return ["its artifact is in the cache no longer: a file of it was removed or changed"]
        differences = list(_compare(record, now, step))
        rank = (len(differences), record.get("name") != step.name)
        if best is None or rank <= best[0]:  # of equals the last, which is the one used most recently
            best = (rank, differences)
    if best is None:
        return [] if waiting else [f"no {step.kind} step was ever run with this cache"]
    return best[1]


def _compare(old: Mapping[str, Any], now: Mapping[str, Any], step: Step) -> Iterator[str]:
    if old.get("code") != now["code"]:
        yield f"the code of the step {step.kind} changed"
    yield from _changes(old.get("toolchain", {}), now["toolchain"])
    yield from _changes(old.get("fields", {}), now["fields"])
    if "inputs" in now:
        sources = {item.name: item.step or str(item.path) for item in step.inputs}
        before = old.get("inputs", {})
        for name in sorted({*before, *now["inputs"]}):
            if before.get(name) != now["inputs"].get(name):
                yield f"input {name}: other content ({sources.get(name, 'no longer an input')})"


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """`quantization.weights.group_size 32 → 40`, a line for each leaf that differs."""
    before, after = dict(_leaves("", old)), dict(_leaves("", new))
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            yield f"{name} {_short(before.get(name, '(absent)'))} → {_short(after.get(name, '(absent)'))}"


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        for position, item in enumerate(value):
            yield from _leaves(f"{name}[{position}]", item)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}…"
