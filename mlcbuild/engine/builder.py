"""One step brought up to date: found in the cache, waited for, or run and committed."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from mlcbuild.cache.action import Action, Damaged
from mlcbuild.cache.disk import room_in
from mlcbuild.cache.layout import lock_path
from mlcbuild.cache.locks import locked
from mlcbuild.cache.store import total_size
from mlcbuild.cache.tree import Entry
from mlcbuild.engine.job import Request
from mlcbuild.engine.lookup import Lookup
from mlcbuild.engine.process import StepBroke
from mlcbuild.engine.resources import Pool, memory_limit, needs
from mlcbuild.engine.run_step import log_of, run_step, tail
from mlcbuild.errors import MlcBuildError, StepFailed, plainly
from mlcbuild.reporting.events import Report, StepFinished, StepNote, StepStarted, StepWaiting

if TYPE_CHECKING:
    from mlcbuild.engine.cluster import Cluster
    from mlcbuild.engine.shared import SharedCache

_T = TypeVar("_T")
_TRIES, _MOST_DAMAGES = 3, 1000


@dataclass(frozen=True)
class Builder:
    """Builds steps of one graph into one store."""

    lookup: Lookup
    report: Report
    debug_dump: Path | None = None
    shared: SharedCache | None = None
    pool: Pool | None = None  # None: whoever calls takes care that not too much runs at once
    cluster: Cluster | None = None  # runs the steps, where there is one; it goes with a shared cache

    def build(self, name: str, force: bool = False) -> Action:
        """The step's action, after running whatever is missing; `force` runs this step even if it is not.

        Raises StepFailed (StepBroke for a bug or a crash); the text is for the user.
        """
        *needed, _ = self.lookup.graph.closure([name])

        def bring() -> Action:
            for producer in needed:
                self._bring(producer, False)
            return self._bring(name, force)

        return self.mending(name, bring)

    def mending(self, name: str, work: Callable[[], _T]) -> _T:
        """What `work` gives, done again where it meets content that is damaged: the store has forgotten that, so what
        made it runs again. Raises StepFailed where the same file is damaged again and again."""
        met = Counter[str]()
        while True:
            try:
                return work()
            except Damaged as error:
                said = str(error)
            met.update(line.partition(": ")[0] for line in said.splitlines())
            # Of a step that never gives the same bytes, each damaged file is another one.
            if max(met.values()) == _TRIES or met.total() > _MOST_DAMAGES:
                said = f"{said}. It was built again, and is damaged again: check the disk"
                self.report(StepFinished(name, name.partition(":")[0], "failed", 0.0, 0, said))
                raise StepFailed(f"{name}: {said}")
            self.report(StepNote(name, f"{said}; what made it runs again"))
            self.lookup.forget()

    def _bring(self, name: str, force: bool) -> Action:
        """The action of a step whose inputs are there: found, made by another process meanwhile, fetched, or run."""
        store = self.lookup.store
        with contextlib.ExitStack() as held:
            with self._failing(name):
                found = None if force else self.lookup.find(name)
                if found is not None:
                    return found
                request = self.request(name)
                key = request.ingredients.key
                held.enter_context(room_in(store.root))
                lock = lock_path(store.root, key)
                held.enter_context(locked(lock, waiting=lambda: self.report(StepWaiting(name))))
                action = None if force else self._built_meanwhile(name, key) or self._fetched(request)
            action = action or self._run(request, force)
        self.lookup.learn(name, action)
        return action

    def request(self, name: str) -> Request:
        """What is to be run for the step. Raises StepFailed where an input is not there, Damaged where it changed."""
        step, ingredients = self.lookup.graph.steps[name], self.lookup.ingredients(name)
        if ingredients is None:
            raise StepFailed("an input vanished from the cache while it was needed: build again")
        materials: list[Entry] = []
        for producer in step.materials:
            action = self.lookup.find(producer)
            if action is None:
                raise StepFailed(f"{producer}: vanished from the cache while it was needed: build again")
            materials += action.tree.files.values()
        limit = memory_limit(self.lookup.graph, name)
        request = Request(name, step.module, step.entry, ingredients, tuple(materials), limit)
        store = self.lookup.store
        store.check(entry for entry in request.given if store.owns(entry.path))  # others were looked at for the key
        return request

    def _built_meanwhile(self, name: str, key: str) -> Action | None:
        action = self.lookup.store.action(key)
        if action is not None:
            self._finished(name, "hit", 0.0, action)
        return action

    def _fetched(self, request: Request) -> Action | None:
        """The action from the shared cache. What only refers to files of this machine is not asked for."""
        if self.shared is None or self._refers_only(request.name):
            return None
        started, store = time.monotonic(), self.lookup.store
        action = self.shared.fetch(request.ingredients, store, self._saying(request.name))
        if action is not None:
            store.index.add(action.step, "fetched", 1)
            self.report(StepNote(request.name, "from the shared cache"))
            self._finished(request.name, "hit", time.monotonic() - started, action)
        return action

    def _run(self, request: Request, force: bool) -> Action:
        name, kind, store = request.name, request.ingredients.kind, self.lookup.store
        cluster = None if self._refers_only(name) else self.cluster
        with self._room(name) if cluster is None else contextlib.nullcontext():
            self.report(StepStarted(name, kind))
            with self._failing(name, log_of(store, request.ingredients)):
                if cluster is not None:
                    action = self._elsewhere(cluster, request, force)
                else:
                    action = run_step(request, store, self.report, self.debug_dump)
            self._finished(name, "built", action.seconds, action)
        store.index.add(kind, "built", 1)
        if self.shared is not None and cluster is None:
            self.shared.give(action, store, self._saying(name))
        return action

    @contextlib.contextmanager
    def _failing(self, name: str, log: Path | None = None) -> Iterator[None]:
        """What goes wrong inside is an event, with the end of the log, and a StepFailed or StepBroke with its text.

        But for content that is damaged, which `mending` knows how to mend.
        """
        started = time.monotonic()
        try:
            with plainly():
                yield
        except Damaged:
            raise
        except MlcBuildError as error:
            seconds, kind = time.monotonic() - started, self.lookup.graph.steps[name].kind
            said = tail(log) if log else ""
            self.report(StepFinished(name, kind, "failed", seconds, 0, str(error), log=said))
            raise (StepBroke if isinstance(error, StepBroke) else StepFailed)(f"{name}: {error}") from None

    def _elsewhere(self, cluster: Cluster, request: Request, force: bool) -> Action:
        """The action, made by a worker and fetched from the shared cache."""
        say = self._saying(request.name)
        cluster.run(request, self.lookup.graph, self.lookup.store, force, say)
        action = self.shared.fetch(request.ingredients, self.lookup.store, say) if self.shared is not None else None
        if action is None:
            raise StepFailed("a worker has built it, but the shared cache does not give it to this machine")
        return action

    def _room(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Hold what the step takes of this machine."""
        if self.pool is None:
            return contextlib.nullcontext()
        return self.pool.taken(needs(self.lookup.graph, name, self.pool.totals["cores"]))

    def _refers_only(self, name: str) -> bool:
        """Whether the step does no more than to say where files of this machine lie."""
        step = self.lookup.graph.steps[name]
        return bool(step.inputs) and not step.producers

    def _saying(self, name: str) -> Callable[[str], None]:
        return lambda text: self.report(StepNote(name, text))

    def _finished(self, name: str, outcome: Literal["hit", "built"], seconds: float, action: Action) -> None:
        size = total_size(action.tree.files.values())
        self.report(StepFinished(name, action.step, outcome, seconds, size, key=action.key))
