"""Which libraries that this workspace's recipes build a structure could use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlcbuild.models.structure import Structure
from mlcbuild.planning.planner import plan
from mlcbuild.recipes.types import Catalog
from mlcbuild.workspace.hub_locks import locker

_LIMITS = ("context_window_size", "prefill_chunk_size", "max_batch_size")


@dataclass(frozen=True)
class Reuse:
    """Libraries (names of tasks) by the recipes that build them: those of the same structure, and those that only
    other limits keep apart, with the overrides that would make them the same. `unknown` recipes are not locked."""

    same: Mapping[str, tuple[str, ...]]
    close: Mapping[str, Mapping[str, int]]
    unknown: int


def reuse(structure: Structure, catalog: Catalog) -> Reuse:
    """Every quantization and target of the catalog's recipes counts; what each is for is in the library's name.

    But for budgets: what their libraries are for is what one model chose.
    """
    wanted = _plain(structure.library_json())
    graph = plan(catalog, catalog.recipes.values(), locker(catalog.root))
    same: dict[str, list[str]] = {}
    close: dict[str, Mapping[str, int]] = {}
    for name, goal in graph.goals.items():
        if "allocate" in goal.steps:
            continue
        fields = _plain(graph.steps[goal.steps["lower"]].fields["structure"])
        differing = [key for key in {**fields, **wanted} if fields.get(key) != wanted.get(key)]
        if not differing:
            same.setdefault(goal.steps["library"], []).append(name)
        elif set(differing) <= set(_LIMITS):
            close[goal.steps["library"]] = {key: fields[key] for key in _LIMITS if key in differing}
    return Reuse({key: tuple(names) for key, names in same.items()}, close, len(graph.unlocked))


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(fields))
    return plain
