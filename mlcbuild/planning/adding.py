"""The steps of a plan, each once and under a name of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

from mlcbuild.cache.tree import digest_json
from mlcbuild.engine.graph import Input, Step
from mlcbuild.planning.backends import COSTS


class Steps:
    """Those that were added, by name. `package` has a module for each kind of step."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.added: dict[str, Step] = {}
        self._names: dict[Hashable, str] = {}  # by meaning
        self._digests: dict[int, tuple[Any, str]] = {}  # by id, with what has it, so that it is nobody else's

    def add(
        self,
        kind: str,
        label: str,
        fields: Mapping[str, Any],
        inputs: tuple[Input, ...] = (),
        materials: tuple[str, ...] = (),
        entry: str = "",
        takes: tuple[str, ...] = (),
        brings: int = 0,
    ) -> str:
        """The name of the step with this meaning; a new one is called `kind:label` unless another meaning is.

        `entry` is the function of a backend that the step calls; `takes` is added to what its kind takes.
        """
        # Types, because 1, 1.0 and true are one key of a dict, and three values in the key of an action.
        told: list[Any] = [kind, inputs, materials, entry]
        for field in sorted(fields):
            value = fields[field]
            told += [field, type(value), value if type(value) is str else self._told(value)]
        meaning: Hashable = tuple(told)
        name = self._names.get(meaning)
        if name is None:
            name = f"{kind}:{label}"
            if name in self.added:
                name = f"{name}-{_digest(kind, fields, inputs, materials, entry)[:8]}"
            self._names[meaning] = name
            cost = dataclasses.replace(COSTS[kind], takes=(*COSTS[kind].takes, *takes)) if takes else COSTS[kind]
            self.added[name] = Step(
                kind, name, f"{self.package}.{kind}", fields, inputs, materials, entry, cost, brings
            )
        return name

    def _told(self, value: Any) -> Hashable:
        """A field's value as it can be part of a meaning. What many steps share, like a structure, is digested once."""
        if isinstance(value, list):
            return tuple(map(self._told, value))
        if not isinstance(value, dict):
            told: Hashable = value
            return told
        known = self._digests.get(id(value))
        if known is None:
            known = self._digests[id(value)] = (value, digest_json(value))
        return known[1]


def _digest(
    kind: str, fields: Mapping[str, Any], inputs: tuple[Input, ...], materials: tuple[str, ...], entry: str
) -> str:
    """Of a meaning, the same on every machine: it tells steps apart that would have one name."""
    wanted = [[item.name, item.step, str(item.path), item.select] for item in inputs]
    # In a list, which no field has of one text.
    told = {name: [digest_json(value)] if isinstance(value, dict) else value for name, value in fields.items()}
    return digest_json([kind, told, wanted, materials, entry])
