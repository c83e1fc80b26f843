"""One step brought up to date: found in the cache, waited for, or run and committed."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlcbuild.cache.disk import room_in
from mlcbuild.cache.layout import lock_path
from mlcbuild.cache.locks import locked
from mlcbuild.cache.store import Action, total_size
from mlcbuild.cache.tree import Entry
from mlcbuild.engine.graph import Step
from mlcbuild.engine.lookup import Ingredients, Lookup
from mlcbuild.engine.process import StepBroke
from mlcbuild.engine.resources import Pool, needs
from mlcbuild.engine.run_step import attempt, log_of, tail
from mlcbuild.errors import MlcBuildError, StepFailed
from mlcbuild.reporting.events import Report, StepFinished, StepNote, StepStarted, StepWaiting

if TYPE_CHECKING:
    from mlcbuild.engine.cluster import Cluster
    from mlcbuild.engine.shared import SharedCache


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
        step = self.lookup.graph.steps[name]
        for producer in step.producers:
            self.build(producer)
        found = None if force else self.lookup.find(name)
        if found is not None:
            return found
        ingredients = self.lookup.ingredients(name)
        if ingredients is None:
            raise StepFailed(f"{name}: an input vanished from the cache while it was needed: build again")
        store, key = self.lookup.store, ingredients.key
        with (
            room_in(store.root),
            locked(lock_path(store.root, key), waiting=lambda: self.report(StepWaiting(name))),
        ):
            action = None if force else store.action(key)  # another process may have built it just now
            if action is None and not force:
                action = self._fetched(step, ingredients)
            elif action is not None:
                self.report(StepFinished(name, step.kind, "hit", 0.0, total_size(action.tree.files.values())))
            if action is None:
                elsewhere = self.cluster is not None and not _refers_only(step)
                with contextlib.nullcontext() if elsewhere else self._room(name):
                    action = self._timed(step, ingredients, force)
                store.index.add(step.kind, "built", 1)
                if self.shared is not None and not elsewhere:
                    self.shared.give(action, store, lambda text: self.report(StepNote(name, text)))
        self.lookup.learn(name, action)
        return action

    def _room(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Hold what the step takes of this machine."""
        if self.pool is None:
            return contextlib.nullcontext()
        return self.pool.taken(needs(self.lookup.graph, name, self.pool.totals["cores"]))

    def _fetched(self, step: Step, ingredients: Ingredients) -> Action | None:
        """The action from the shared cache. What only refers to files of this machine is not asked for."""
        if self.shared is None or _refers_only(step):
            return None
        started, store = time.monotonic(), self.lookup.store
        action = self.shared.fetch(ingredients, store, lambda text: self.report(StepNote(step.name, text)))
        if action is not None:
            size = total_size(action.tree.files.values())
            store.index.add(step.kind, "fetched", 1)
            self.report(StepNote(step.name, "from the shared cache"))
            self.report(StepFinished(step.name, step.kind, "hit", time.monotonic() - started, size))
        return action

    def _timed(self, step: Step, ingredients: Ingredients, force: bool) -> Action:
        self.report(StepStarted(step.name, step.kind))
        started, store = time.monotonic(), self.lookup.store
        try:
            materials = self._materials(step)
            if self.cluster is not None and not _refers_only(step):
                action = self._elsewhere(self.cluster, step, ingredients, materials, force)
            else:
                action = attempt(step.name, step.module, ingredients, materials, store, self.report, self.debug_dump)
        except MlcBuildError as error:
            seconds = time.monotonic() - started
            log = tail(log_of(store, ingredients))
            self.report(StepFinished(step.name, step.kind, "failed", seconds, 0, str(error), log=log))
            broke = isinstance(error, StepBroke)
            raise (StepBroke if broke else StepFailed)(f"{step.name}: {error}") from None
        size = total_size(action.tree.files.values())
        self.report(StepFinished(step.name, step.kind, "built", action.seconds, size))
        return action

    def _elsewhere(
        self, cluster: Cluster, step: Step, ingredients: Ingredients, materials: list[Entry], force: bool
    ) -> Action:
        """The action, made by a worker and fetched from the shared cache."""

        def say(text: str) -> None:
            self.report(StepNote(step.name, text))

        cluster.run(step, self.lookup.graph, ingredients, materials, force, say)
        action = self.shared.fetch(ingredients, self.lookup.store, say) if self.shared is not None else None
        if action is None:
            raise StepFailed("a worker has built it, but the shared cache does not give it to this machine")
        return action

    def _materials(self, step: Step) -> list[Entry]:
        """The content that the step's inputs refer to by digest."""
        entries: list[Entry] = []
        for producer in step.materials:
            action = self.lookup.find(producer)
            if action is None:
                raise StepFailed(f"{producer}: vanished from the cache while it was needed: build again")
            entries += action.tree.files.values()
        return entries


def _refers_only(step: Step) -> bool:
    """Whether the step does no more than to say where files of this machine lie."""
    return bool(step.inputs) and not step.producers
