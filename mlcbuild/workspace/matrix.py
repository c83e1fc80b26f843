"""`mlcbuild matrix`: which recipes share which libraries and weights, and of which nothing is known before a lock."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlcbuild.text import count
from mlcbuild.workspace.session import Session

_JOBS = 256  # of one matrix of GitHub Actions, at most


@dataclass(frozen=True)
class Matrix:
    """Recipes by the step that makes what they share. `unlocked` are recipes by model, with what is not locked."""

    recipes: tuple[str, ...]
    libraries: Mapping[str, tuple[str, ...]]
    weights: Mapping[str, tuple[str, ...]]
    unlocked: Mapping[str, tuple[str, ...]]
    unavailable: Mapping[str, str]
    broken: Mapping[str, str]
    notes: Mapping[str, str]  # model -> which repository has no entry

    @property
    def known(self) -> int:
        """How many recipes the figures are about."""
        return len(self.recipes) - len(self.unavailable) - len(self.broken) - self.unknown

    @property
    def unknown(self) -> int:
        return sum(map(len, self.unlocked.values()))


def matrix(session: Session) -> Matrix:
    """Of the session's recipes."""
    graph, known = session.graph, session.catalog.recipes
    every = [*graph.goals, *graph.unlocked, *graph.unavailable, *graph.broken]
    return Matrix(
        recipes=tuple(sorted(every)),
        libraries=_by((goal.steps["library"], name) for name, goal in graph.goals.items()),
        weights=_by((goal.steps["quantize"], name) for name, goal in graph.goals.items()),
        unlocked=_by((known[name].model.name, name) for name in graph.unlocked),
        unavailable=graph.unavailable,
        broken=graph.broken,
        notes={known[name].model.name: text for name, text in graph.unlocked.items()},
    )


def render(found: Matrix) -> str:
    """The matrix as text: the figures, then what is shared by most recipes first."""
    lines = [
        f"{count(len(found.libraries), 'library', 'libraries')} and {count(len(found.weights), 'set')} of weights "
        f"for {count(found.known, 'recipe')}"
    ]
    if found.unlocked:
        lines[0] += f"; {count(found.unknown, 'recipe')} of {count(len(found.unlocked), 'model')} unknown until locked"
    for title, groups in (("libraries", found.libraries), ("weights", found.weights)):
        if groups:
            lines += ["", title, *_grouped(groups)]
    if found.unlocked:
        lines += ["", "unknown until locked"]
        for model, names in sorted(found.unlocked.items()):
            lines.append(f"  {model}  {count(len(names), 'recipe')}: {found.notes[model]}")
    for title, texts in (("unavailable", found.unavailable), ("broken", found.broken)):
        reasons = _by((text, name) for name, text in texts.items())
        if reasons:
            lines += ["", title]
        for text, names in reasons.items():
            lines.append(f"  {names[0] if len(names) == 1 else count(len(names), 'recipe')}: {text}")
    return "\n".join(lines) + "\n"


def to_json(found: Matrix) -> str:
    """The matrix as JSON."""
    content: dict[str, Any] = {
        "recipes": len(found.recipes),
        "known": found.known,
        "libraries": found.libraries,
        "weights": found.weights,
        "unlocked": found.unlocked,
        "unavailable": found.unavailable,
        "broken": found.broken,
    }
    return json.dumps(content, indent=1, default=dict) + "\n"


def to_github(found: Matrix, most: int = _JOBS) -> str:
    """The unique steps as three matrices for GitHub Actions, on one line: weights and libraries, then packages.

    A job is `{name, tasks}`; where there would be more than `most`, jobs have several tasks.
    """
    recipes = sorted({name for names in found.libraries.values() for name in names})
    stages = {
        "weights": sorted(found.weights),
        "libraries": sorted(found.libraries),
        "packages": [f"build:{name}" for name in recipes],
    }
    return json.dumps({stage: {"include": _jobs(tasks, most)} for stage, tasks in stages.items()}) + "\n"


def _jobs(tasks: list[str], most: int) -> list[dict[str, str]]:
    together = max(1, -(-len(tasks) // most))
    jobs = []
    for start in range(0, len(tasks), together):
        mine = tasks[start : start + together]
        more = f" and {len(mine) - 1} more" if len(mine) > 1 else ""
        jobs.append({"name": mine[0].partition(":")[2] + more, "tasks": " ".join(mine)})
    return jobs


def _grouped(groups: Mapping[str, tuple[str, ...]]) -> list[str]:
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [f"  {name.partition(':')[2]}  {count(len(names), 'recipe')}: {' '.join(names)}" for name, names in ordered]


def _by(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(key, []).append(name)
    return {key: tuple(sorted(names)) for key, names in groups.items()}
