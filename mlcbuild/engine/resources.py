"""What a step needs of a machine while it runs, and who may run beside whom.

A step declares nothing of this itself: it is no part of its result. What each kind takes stands in one table here, and
grows with the bytes of the checkpoint behind the step. A machine has cores, memory and some things of which one is
enough (`LIMITS`). Steps are started in the order in which they became ready; one that has to wait for a resource is
not overtaken by others that want the same.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlcbuild.cache.tree import matches
from mlcbuild.engine.graph import Graph, Step

# Of these a machine has a number that does not depend on its size. A download waits for the network, not for a core.
LIMITS = {"network": 4, "nvcc": 1}
TAGS = ("nvcc",)  # what not every machine has: Dask resources of workers
_SMALL = 200_000_000  # bytes of a checkpoint: below, a step's time is its start, and that uses one core
_RESERVE = 0.9  # of the free memory


@dataclass(frozen=True)
class _Cost:
    """`threads`: all cores for a model that is not small. Memory: base + factor * checkpoint, at most `most` bytes."""

    threads: bool
    base: float  # bytes
    factor: float = 0.0
    most: float = float("inf")


# Streaming steps hold pieces of the largest tensor; verification holds the model twice, once as float32.
_COSTS = {
    "download": _Cost(False, 0.2e9),
    "convert": _Cost(False, 0.2e9, 1.0, 3e9),
    "calibrate": _Cost(True, 0.5e9, 0.5, 8e9),
    "quantize": _Cost(True, 0.3e9, 1.0, 3e9),
    "lower": _Cost(False, 1.0e9),
    "runtime": _Cost(False, 1.0e9),
    "library": _Cost(False, 0.7e9),
    "package": _Cost(False, 0.2e9),
    "verify": _Cost(True, 0.5e9, 3.0, 12e9),
}
_OTHER = _Cost(False, 0.5e9)


@dataclass(frozen=True)
class Budget:
    """Cores and bytes of memory that all running steps may use together."""

    cores: int
    memory: int

    def totals(self) -> dict[str, int]:
        return {"cores": self.cores, "memory": self.memory, **LIMITS}


def budget(cores: int | None = None, memory: int | None = None) -> Budget:
    """What is asked for; where nothing is, this process's cores and nine tenths of the free memory."""
    return Budget(cores or len(os.sched_getaffinity(0)), memory or int(_RESERVE * free_memory()))


def free_memory() -> int:
    """Bytes that could be used now: the system's, or what the control group leaves of its limit."""
    free = 8 * 10**9
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, max(0, limit - int((group / "memory.current").read_text())))
    return free


def needs(graph: Graph, name: str, cores: int) -> dict[str, int]:
    """What the step called `name` takes on a machine with so many cores, by resource."""
    step = graph.steps[name]
    cost = _COSTS.get(step.kind, _OTHER)
    size = checkpoint_bytes(graph, name)
    found = {
        "cores": cores if cost.threads and size >= _SMALL else 1,
        "memory": int(min(cost.most, cost.base + cost.factor * size)),
    }
    if step.kind == "download":
        found = {"network": 1, "memory": found["memory"]}
    return {**found, **dict.fromkeys(tags(step), 1)}


def tags(step: Step) -> tuple[str, ...]:
    """What the step needs that not every machine has."""
    device = step.fields.get("device", {}).get("kind")
    return ("nvcc",) if step.kind == "library" and device == "cuda" else ()


def checkpoint_bytes(graph: Graph, name: str) -> int:
    """Bytes of the checkpoints that the step is made from, as far as they are known before they are here."""
    total, seen, waiting = 0, {name}, [name]
    while waiting:
        step = graph.steps[waiting.pop()]
        if step.kind == "download":
            total += sum(file["size"] for file in step.fields.get("files", {}).values())
            total += sum(_folder_bytes(item.path, item.select) for item in step.inputs if item.path is not None)
        waiting += [producer for producer in step.producers if producer not in seen]
        seen |= set(step.producers)
    return total


def _folder_bytes(folder: Path, select: tuple[str, ...]) -> int:
    try:
        files = [entry for entry in folder.iterdir() if not select or matches(entry.name, select)]
        return sum(entry.stat().st_size for entry in files)
    except OSError:
        return 0


class Pool:
    """The resources of one machine, taken and given back by threads."""

    def __init__(self, totals: Mapping[str, int]) -> None:
        self.totals = dict(totals)
        self._free = dict(totals)
        self._waiting: list[tuple[object, Mapping[str, int]]] = []
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, wanted: Mapping[str, int]) -> Iterator[None]:
        """Wait for what is wanted and hold it. More than there is at all counts as all there is."""
        own = {name: min(amount, self.totals[name]) for name, amount in wanted.items() if name in self.totals}
        ticket = object()
        with self._changed:
            self._waiting.append((ticket, own))
            while not self._is_next(ticket):
                self._changed.wait()
            self._waiting = [other for other in self._waiting if other[0] is not ticket]
            for name, amount in own.items():
                self._free[name] -= amount
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                for name, amount in own.items():
                    self._free[name] += amount
                self._changed.notify_all()

    def _is_next(self, ticket: object) -> bool:
        """Whether it fits, and takes nothing that somebody who came before is short of."""
        free, kept = dict(self._free), set[str]()
        for other, wanted in self._waiting:
            short = {name for name, amount in wanted.items() if amount > free[name]}
            fits = not short and not kept & wanted.keys()
            if other is ticket:
                return fits
            kept |= short
            if fits:  # it is about to start, whichever thread wakes first
                free = {name: amount - wanted.get(name, 0) for name, amount in free.items()}
        return False
