"""A workspace opened for building: its recipes, their graph, its cache, and what can be asked of them."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlcbuild.cache.action import Action
from mlcbuild.cache.disk import room_in
from mlcbuild.cache.files import Progress
from mlcbuild.cache.layout import RECIPES_MEMO
from mlcbuild.cache.locks import sweep_dead
from mlcbuild.cache.pins import hold_package
from mlcbuild.cache.store import Store, total_size
from mlcbuild.cache.tree import Entry
from mlcbuild.engine.builder import Builder
from mlcbuild.engine.graph import Goal, Graph
from mlcbuild.engine.lookup import Lookup
from mlcbuild.engine.resources import Pool
from mlcbuild.errors import MlcBuildError, StepFailed, Unavailable
from mlcbuild.planning.outline import outline
from mlcbuild.planning.planner import plan
from mlcbuild.recipes.changed import changed_since
from mlcbuild.recipes.load import load
from mlcbuild.recipes.select import Selection, cells, manual
from mlcbuild.recipes.types import Catalog
from mlcbuild.reporting.events import PackageInstalled, RecipeUnavailable, Report, StepNote, StepProgress
from mlcbuild.workspace.hub_locks import lock_missing, locker
from mlcbuild.workspace.install import damages, install, is_installed
from mlcbuild.workspace.manifest import manifest

if TYPE_CHECKING:
    from mlcbuild.engine.cluster import Cluster
    from mlcbuild.engine.shared import SharedCache

QUALITY = "quality.json"
_PROGRESS_EVERY = 0.5  # seconds


@dataclass(frozen=True)
class Settings:
    """How the recipes of a session are planned and built."""

    cache: Path | None = None  # None: cache/ in the workspace
    locked: bool = False  # a hub model that is not in recipes.lock is broken
    names_only: bool = False  # nothing is asked of steps but their names and kinds
    keep_going: bool = False  # what is wrong with a model breaks its recipes and no others
    debug_dump: Path | None = None
    shared: SharedCache | None = None
    pool: Pool | None = None  # None: whoever builds takes care that not too much runs at once
    cluster: Cluster | None = None


@dataclass(frozen=True)
class Session:
    """One workspace, a selection of its recipes, one cache."""

    root: Path
    catalog: Catalog
    graph: Graph
    builder: Builder

    @property
    def store(self) -> Store:
        return self.lookup.store

    @property
    def lookup(self) -> Lookup:
        return self.builder.lookup

    @property
    def dist(self) -> Path:
        return self.root / "dist"

    def is_built(self, name: str) -> bool:
        """Whether the step called `name` and everything before it is up to date."""
        return self.lookup.find(name) is not None

    def is_installed(self, recipe: str) -> bool:
        """Whether every step of the recipe is up to date and dist/ holds what they made."""
        package = self._package(self.graph.goals[recipe])
        return package is not None and is_installed(self.dist, recipe, *package)

    def install(self, recipe: str, force: bool = False) -> None:
        """Bring the recipe's steps up to date and install the package, from bytes that are hashed on their way.

        What turns out to be damaged in the cache is built again. Raises MlcBuildError.
        """
        self.builder.mending(f"build:{recipe}", lambda: self._install(recipe, force))
        with room_in(self.store.root):
            hold_package(self.store, self.dist / recipe, self.keys(recipe) or ())

    def prove(self, recipe: str, step: str) -> None:
        """Read every byte of the package in dist/, and put it there anew where one is not what was built.

        `step` is what the progress of this and the notes are reported of. Raises MlcBuildError.
        """
        report = self.builder.report
        package = self._package(self.graph.goals[recipe])
        wrong = ["it is not built"]
        if package is not None:
            with room_in(self.dist):
                wrong = damages(self.dist, recipe, *package, _progress(report, step))
        if wrong:
            report(StepNote(step, "; ".join(wrong[:3]) + ": installed again from the cache"))
            self.install(recipe, force=True)

    def _install(self, recipe: str, force: bool) -> None:
        goal, report = self.graph.goals[recipe], self.builder.report
        self.builder.build(goal.steps["verify"])
        package = self._package(goal)
        if package is None:
            raise StepFailed(f"build:{recipe}: a step's files vanished from the cache: build again")
        if force or not is_installed(self.dist, recipe, *package):
            install(self.dist, recipe, *package, self.store, _progress(report, f"build:{recipe}"))
            size = total_size(package[0].values())
            report(PackageInstalled(recipe, f"dist/{recipe}", "installed", size))

    def needed(self, recipe: str) -> list[str]:
        """The recipe's steps and everything that they need, in running order."""
        return self.graph.closure(self.graph.goals[recipe].steps.values())

    def keys(self, recipe: str) -> list[str] | None:
        """The keys of the actions behind the recipe's package; None while a step is not up to date."""
        actions = [self.lookup.find(name) for name in self.needed(recipe)]
        return None if None in actions else [action.key for action in actions if action is not None]

    def forget(self, names: list[str]) -> list[str]:
        """Remove the action entries of these steps; the steps that had one."""
        actions = [(name, self.lookup.find(name)) for name in names]
        with room_in(self.store.root):
            return [name for name, action in actions if action is not None and self.store.forget(action.key)]

    def _package(self, goal: Goal) -> tuple[Mapping[str, Entry], bytes] | None:
        """The files to install and the manifest's text; None while a step is not up to date."""
        actions: dict[str, Action] = {}
        for kind, name in goal.steps.items():
            action = self.lookup.find(name)
            if action is None:
                return None
            actions[kind] = action
        quality = actions["verify"].tree
        files = {**actions["package"].tree.files, QUALITY: quality.files[QUALITY]}
        device = self.graph.steps[goal.steps["library"]].fields["device"]
        return files, manifest(goal, actions, files, quality.read_json(QUALITY), device)


def _progress(report: Report, step: str) -> Progress:
    """A progress that is reported of `step`, where a person has to wait for it."""
    shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > _PROGRESS_EVERY:
            shown = time.monotonic()
            report(StepProgress(step, done, total, "bytes"))

    return progress


def open_store(root: Path, cache: Path | None = None) -> Store:
    """The cache of the workspace at `root`, or the folder `cache`. Raises MlcBuildError where it cannot be one."""
    folder = cache or root / "cache"
    try:
        with room_in(folder):
            store = Store(folder.absolute())
            sweep_dead(store.root)
    except OSError as error:
        raise MlcBuildError(f"{folder}: cannot be used as a cache: {error.strerror}") from None
    except MlcBuildError as error:
        raise MlcBuildError(f"{folder}: cannot be used as a cache: {error}") from None
    return store


_MANY = 200_000  # new objects between two looks for garbage: where there are millions, each look is dear


@contextlib.contextmanager
def growing() -> Iterator[None]:
    """What is made inside stays, thousands of steps and tasks of it: to look for garbage among them takes a fifth of
    the time of `doit list`."""
    outermost = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if outermost:
            if gc.get_count()[0] > _MANY:
                gc.freeze()
            gc.set_threshold(_MANY, 50, 1000)
            gc.enable()


@growing()
def open_session(
    root: Path, report: Report, selection: Selection | None = None, settings: Settings | None = None
) -> Session:
    """Read the workspace at `root`, plan the recipes that are selected and open the cache.

    A hub model that is not in recipes.lock is looked up and written there where the selection says so; elsewhere it
    stays unlocked, and no hub is asked.

    Raises MlcBuildError (RecipeError with all problems of the files), unless told to keep going also with everything
    that is wrong with the models; Unavailable for a recipe that is demanded and cannot be built on this machine.
    """
    selection, settings = selection or Selection(), settings or Settings()
    store = open_store(root, settings.cache)
    catalog = load(root, memo=store.root / RECIPES_MEMO)
    known = cells(catalog.recipes)
    names = selection.chosen(known, manual(catalog.recipes))
    if selection.changed is not None:
        changed = changed_since(root, catalog, selection.changed)
        names = [name for name in names if name in changed]
    models = [catalog.recipes[name].model for name in selection.to_look_up(names, known)]
    refused = lock_missing(root, store.root, models, report, refuse=settings.locked)
    make = outline if settings.names_only else plan
    graph = make(catalog, [catalog.recipes[name] for name in names], locker(root, refused))
    if graph.broken and not settings.keep_going:
        raise MlcBuildError("\n".join(dict.fromkeys(graph.broken.values())))
    missing = [f"{name}: unavailable: {graph.unavailable[name]}" for name in selection.demanded(graph.unavailable)]
    if missing:
        raise Unavailable("\n".join(missing))
    for name, text in graph.unavailable.items():
        report(RecipeUnavailable(name, text))
    lookup = Lookup(store, graph)
    builder = Builder(lookup, report, settings.debug_dump, settings.shared, settings.pool, settings.cluster)
    return Session(root, catalog, graph, builder)
