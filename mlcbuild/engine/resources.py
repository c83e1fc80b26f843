"""What a step needs of a machine while it runs, and who may run beside whom.

A step says what it takes (`mlcbuild.engine.graph.Cost`), which grows with the bytes of the checkpoint behind it. A
machine has cores, memory and some things of which it has few (`LIMITS`). Steps are started in the order in which they
became ready; one that has to wait for a resource is not overtaken by others that want the same.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlcbuild import host
from mlcbuild.cache.gc import parse_size
from mlcbuild.cache.tree import matches
from mlcbuild.engine.graph import Graph
from mlcbuild.errors import MlcBuildError

# Of these a machine has a number that does not depend on its size. A download waits for the network, not for a core.
LIMITS = {"network": 4, "nvcc": 1}
TAGS = ("nvcc",)  # what not every machine has: Dask resources of workers
_SMALL = 200_000_000  # bytes of a checkpoint: below, a step's time is its start, and that uses one core
FAR_MORE, LEAST_LIMIT = 4, 8 * 10**9  # times what a step declares; bytes that any step may take
PATIENCE = 120  # minutes
_RESERVE = 0.9  # of the free memory


@dataclass(frozen=True)
class Budget:
    """Cores and bytes of memory that all running steps may use together."""

    cores: int
    memory: int

    def totals(self) -> dict[str, int]:
        return {"cores": self.cores, "memory": self.memory, **LIMITS}


def budget(cores: int | None = None, memory: int | None = None) -> Budget:
    """What is asked for; where nothing is, this process's cores and nine tenths of the free memory."""
    return Budget(cores or len(host.processors()), memory or int(_RESERVE * free_memory()))


def free_memory() -> int:
    """Bytes that could be used now: the system's, or what the control group leaves of its limit."""
    free = 8 * 10**9
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (host.PROC / "meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        group = host.SYS / "fs/cgroup"
        limit = int((group / "memory.max").read_text())
        free = min(free, max(0, limit - int((group / "memory.current").read_text())))
    return free


def needs(graph: Graph, name: str, cores: int) -> dict[str, int]:
    """What the step called `name` takes on a machine with so many cores, by resource."""
    cost, size = graph.steps[name].cost, checkpoint_bytes(graph, name)
    found = {"memory": int(min(cost.most, cost.base + cost.factor * size)), **dict.fromkeys(cost.takes, 1)}
    if "network" not in found:
        found["cores"] = cores if cost.threads and size >= _SMALL else 1
    return found


def memory_limit(graph: Graph, name: str) -> int:
    """Bytes at which the step called `name` has run away: far more than it declares. Raises MlcBuildError."""
    return most_memory(max(LEAST_LIMIT, FAR_MORE * needs(graph, name, 1)["memory"]))


def most_memory(default: int) -> int:
    """Bytes that MLCBUILD_STEP_MEMORY says, or `default`. Raises MlcBuildError."""
    given = os.environ.get("MLCBUILD_STEP_MEMORY")
    try:
        return parse_size(given) if given else default
    except MlcBuildError as error:
        raise MlcBuildError(f"MLCBUILD_STEP_MEMORY={given}: {error}") from None


def silence_limit() -> float:
    """Seconds without a word after which a step hangs. Raises MlcBuildError."""
    text = os.environ.get("MLCBUILD_STEP_SILENCE") or str(PATIENCE)
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return 60 * float(text)
    raise MlcBuildError(f"MLCBUILD_STEP_SILENCE={text}: expected a number of minutes")


def checkpoint_bytes(graph: Graph, name: str) -> int:
    """Bytes of the checkpoints that the step is made from, as far as they are known before they are here."""
    steps = [graph.steps[each] for each in graph.closure([name])]
    folders = [(item.path, item.select) for step in steps for item in step.inputs if item.path is not None]
    return sum(step.brings for step in steps) + sum(_folder_bytes(*folder) for folder in folders)


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
