"""Steps on the machines of a Dask cluster: each unique step is a task, files go through the shared cache.

The scheduler moves a step to another worker when its own dies. What a step needs that not every machine has is asked
for as a Dask resource (`mlcbuild.engine.resources.TAGS`, and `memory` where workers declare how much they have).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Entry
from mlcbuild.engine.graph import Graph
from mlcbuild.engine.job import Request
from mlcbuild.engine.process import StepBroke
from mlcbuild.engine.resources import TAGS, needs
from mlcbuild.engine.shared import SharedCache
from mlcbuild.errors import MlcBuildError, StepFailed
from mlcbuild.text import amount

_LIVES = 3  # workers that may die of one step before it is given up
# Those of Dask's that have a level and a handler of their own, and where asyncio tells of what nobody awaited.
_LOGGERS = ("distributed", "distributed.client", "distributed.gc", "asyncio", "tornado", "tornado.application")
_SCHEDULER_LOST = (
    "the cluster was lost: its scheduler does not answer any more. Start it again, then the build: what is finished is "
    "kept"
)


class Cluster:
    """A scheduler with its workers, used by several threads."""

    def __init__(self, address: str, shared: SharedCache, patience: float) -> None:
        """`patience`: seconds for the scheduler to answer, and for its first worker to come.

        Raises MlcBuildError where none does.
        """
        try:
            from distributed import Client
        except ImportError:
            raise MlcBuildError("scheduler= needs one package more: pip install 'mlcbuild[dask]'") from None
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # what matters is said by what fails
        self._shared = shared
        self._sent: set[str] = set()
        self._lock = threading.Lock()
        try:
            self._client = Client(address, timeout=patience, name="mlcbuild", set_as_default=False)
        except (OSError, ValueError) as error:
            raise MlcBuildError(f"scheduler={address}: no Dask scheduler answers there: {error}") from None
        try:
            self._client.wait_for_workers(1, timeout=patience)
        except TimeoutError:
            self.close()
            raise MlcBuildError(f"scheduler={address}: it has no worker, and none came in {patience:g} s") from None

    def check(self, graph: Graph, names: Iterable[str]) -> None:
        """Raises MlcBuildError where a step needs what no worker has: it would wait for ever."""
        workers = [worker.get("resources") or {} for worker in self._workers().values()]
        lacking: dict[str, list[str]] = {}
        for name in names:
            wanted = self._resources(graph, name)
            if not any(all(worker.get(key, 0) >= value for key, value in wanted.items()) for worker in workers):
                words = ", ".join(
                    f"{amount(value)} of memory" if key == "memory" else key for key, value in wanted.items()
                )
                lacking.setdefault(words, []).append(name)
        if lacking:
            said = [
                f"{', '.join(steps[:3])}{' …' if len(steps) > 3 else ''}: {what}" for what, steps in lacking.items()
            ]
            raise MlcBuildError(
                f"no worker of the cluster has what these steps need, so nothing was started: {'; '.join(said)}. "
                'Start a worker that has it: dask worker ADDRESS --resources "nvcc=1 memory=64e9"'
            )

    def run(self, request: Request, graph: Graph, store: Store, force: bool, say: Callable[[str], None]) -> None:
        """Run the step on a worker; its result is then in the shared cache.

        Raises StepFailed, StepBroke, and Damaged for an input that has to be made again.
        """
        self._send(request.given, store, say)
        answer = self._result(request, graph, force)
        if "failed" in answer:
            log = f"\nThe last lines of its log, on {answer['worker']}:\n{answer['log']}" if answer["log"] else ""
            raise (StepBroke if answer["broke"] else StepFailed)(f"{answer['failed']}{log}")

    def close(self) -> None:
        """Leave the cluster; steps that run there run to their end, and their results are kept."""
        self._client.close()

    def _result(self, request: Request, graph: Graph, force: bool) -> dict[str, Any]:
        from distributed import KilledWorker
        from distributed.client import FutureCancelledError

        from mlcbuild.engine.worker import work

        remote = self._shared.remote
        # A key of its own for each call: Dask would give the result of an earlier one, also of a failure.
        future = self._client.submit(
            work,
            request.to_json(),
            remote.url,
            remote.patience,
            force,
            key=f"{request.name}-{id(request)}",
            resources=self._resources(graph, request.name),
            pure=False,
            retries=_LIVES,
        )
        try:
            answer: dict[str, Any] = future.result()
        except KilledWorker:
            raise StepBroke(
                "the workers that ran it died, one after the other; has one enough memory for it?"
            ) from None
        except FutureCancelledError as error:
            if error.reason == "scheduler-connection-lost":
                raise StepFailed(_SCHEDULER_LOST) from None
            raise StepFailed(f"the cluster did not run it to its end: {error}: build again") from None
        except Exception as error:  # whatever a worker or the connection comes up with
            raise StepBroke(f"the cluster could not run it: {type(error).__name__}: {error}") from None
        return answer

    def _send(self, entries: Iterable[Entry], store: Store, say: Callable[[str], None]) -> None:
        """Put content into the shared cache that workers may not have; what this build has put there, once."""
        with self._lock:
            wanted = {entry.digest: entry for entry in entries if entry.digest not in self._sent}
            if wanted and not self._shared.send(wanted.values(), store, say):
                raise StepFailed("its inputs could not be put into the shared cache, so no worker can have them")
            self._sent |= wanted.keys()

    def _resources(self, graph: Graph, name: str) -> dict[str, float]:
        told = any("memory" in (worker.get("resources") or {}) for worker in self._workers().values())
        asked_for = {*TAGS, "memory"} if told else {*TAGS}
        return {what: number for what, number in needs(graph, name, 1).items() if what in asked_for}

    def _workers(self) -> dict[str, Any]:
        found: dict[str, Any] = self._client.scheduler_info(n_workers=-1)["workers"]
        return found
