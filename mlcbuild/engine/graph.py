"""The graph of a build as data: steps, what goes into them, and what each recipe wants of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mlcbuild.recipes.types import Recipe


class Input(NamedTuple):  # made and compared by the hundred thousand where a matrix is large
    """One declared input: the artifact of a step, or a file or folder outside the cache."""

    name: str
    step: str | None = None  # the producing task
    path: Path | None = None  # a single file appears in the tree under the input's name
    select: tuple[str, ...] = ()  # shell patterns: only these files count, and only these are seen


@dataclass(frozen=True)
class Cost:
    """What a step takes of a machine while it runs; it is no part of its result.

    `threads`: all cores for a model that is not small. Memory: `base` + `factor` * checkpoint, at most `most` bytes.
    `takes`: one each of what a machine has few of (`mlcbuild.engine.resources.LIMITS`).
    """

    threads: bool = False
    base: float = 0.5e9  # bytes
    factor: float = 0.0
    most: float = float("inf")
    takes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One node of the graph. `name` is the task's, and is in no key; nor are `cost` and `brings`."""

    kind: str
    name: str
    module: str
    fields: Mapping[str, Any]
    inputs: tuple[Input, ...] = ()
    materials: tuple[str, ...] = ()  # tasks whose files an input refers to by digest
    entry: str = ""  # `module:function` that the step's module calls, a backend's; its code is in the key as well
    cost: Cost = Cost()
    brings: int = 0  # bytes that it fetches from elsewhere

    @cached_property
    def producers(self) -> tuple[str, ...]:
        """The tasks that must be done before this one."""
        names = [item.step for item in self.inputs if item.step is not None]
        return tuple(dict.fromkeys([*names, *self.materials]))


@dataclass(frozen=True)
class Goal:
    """What one recipe wants: its steps by kind. `package` and `verify` are what gets installed."""

    recipe: Recipe
    steps: Mapping[str, str]


@dataclass(frozen=True)
class Graph:
    """Steps in an order in which they can run; goals by recipe.

    By recipe too, and why: those that cannot be built on this machine (`unavailable`), those whose model has no entry
    in recipes.lock yet (`unlocked`), those whose model cannot be planned (`broken`).
    """

    steps: Mapping[str, Step]
    goals: Mapping[str, Goal] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)
    unlocked: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)

    def closure(self, names: Iterable[str]) -> list[str]:
        """`names` and everything that they need, in running order."""
        wanted: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in wanted:
                wanted.add(name)
                waiting += self.steps[name].producers
        return sorted(wanted, key=self._positions.__getitem__)

    @cached_property
    def _positions(self) -> Mapping[str, int]:
        return {name: position for position, name in enumerate(self.steps)}
