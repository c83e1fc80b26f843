"""What a run of doit does with a session: opened by the command line's words, looked at before, reported after."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from doit import loader
from doit.globals import Globals
from doit.task import Task

from mlcbuild.cache.locks import begin
from mlcbuild.doit_face.argv import check_words, keeps_going, only_lists, publishes
from mlcbuild.doit_face.reporter import Console, needs
from mlcbuild.doit_face.session_tasks import Publish, tasks_of
from mlcbuild.doit_face.variables import Variables, read_patience
from mlcbuild.doit_face.verbs import lead_to_cache
from mlcbuild.engine.resources import Pool, budget
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.select import Selection
from mlcbuild.reporting.events import json_log
from mlcbuild.workspace.estimate import check_room, estimate
from mlcbuild.workspace.fastpath import remember
from mlcbuild.workspace.reports import planned_in, reasons
from mlcbuild.workspace.session import Session, Settings, growing, open_session

if TYPE_CHECKING:
    from mlcbuild.engine.cluster import Cluster
    from mlcbuild.engine.shared import SharedCache


@growing()
def open_run(variables: Variables, console: Console, began: float) -> list[Task]:
    """All tasks of this run, which `began` then, after arranging what comes before and after them.

    Raises MlcBuildError.
    """
    words, runs = sys.argv[1:], variables.selection.runs
    shared = _shared(variables)
    settings = Settings(
        variables.cache,
        variables.locked,
        keep_going=not runs or keeps_going(words),
        debug_dump=variables.debug_dump,
        shared=shared,
        pool=Pool(budget(variables.cores, variables.memory).totals()),
        cluster=_cluster(variables, console, shared) if runs else None,
        names_only=only_lists(words),
    )
    session = open_session(Path.cwd(), console.report, variables.selection, settings)

    @functools.cache
    def whole() -> Session:
        if not settings.names_only:
            return session
        return open_session(Path.cwd(), lambda event: None, variables.selection, replace(settings, names_only=False))

    if runs and session.graph.broken and not session.graph.goals:
        raise MlcBuildError("\n".join(dict.fromkeys(session.graph.broken.values())))
    begin(session.store.root, session.store.save_counts)
    console.at_start.append(partial(_before, session, console))
    console.at_end.append(lambda: remember(session, began))
    tasks = tasks_of(session, _publisher(session, variables, console) if publishes(words) else None, whole)
    check_words(words, {task.name for task in tasks}, session.graph.unavailable)

    def everything() -> Session:
        every = replace(settings, keep_going=True, names_only=False)
        return open_session(Path.cwd(), console.report, Selection(whole=False), every)

    lead_to_cache(Globals.dep_manager, session, everything)
    return tasks


def _shared(variables: Variables) -> SharedCache | None:
    if variables.remote is None:
        return None
    from mlcbuild.engine.shared import open_shared

    return open_shared(variables.remote, variables.remote_write, read_patience())


def _cluster(variables: Variables, console: Console, shared: SharedCache | None) -> Cluster | None:
    if variables.scheduler is None or shared is None:
        return None
    from mlcbuild.engine.cluster import Cluster

    cluster = Cluster(variables.scheduler, shared, read_patience("MLCBUILD_SCHEDULER_TIMEOUT", "30"))
    console.at_end.append(cluster.close)
    return cluster


def _before(session: Session, console: Console, tasks: Mapping[str, Task], selected: Sequence[str]) -> None:
    """What comes between planning and building. Raises MlcBuildError where the disk is too small for it."""
    for task in tasks.values():
        if task.options and task.options.get("log_json"):  # `--log-json FILE` after the task's name
            console.log = json_log(Path(loader.initial_workdir or ".", task.options["log_json"]).absolute())
    if console.records:
        for event in planned_in(session):
            console.record(event)
    names = {name for wanted in selected for name in (wanted, *needs(tasks, wanted))} & session.graph.steps.keys()
    try:
        with session.lookup.at_once():
            missing = [name for name in session.graph.steps if name in names and not session.is_built(name)]
        if not missing:
            return
        if console.records:
            console.reasons.update(reasons(session, missing))
        coming = estimate(session, missing)
    except MlcBuildError:
        return  # the step meets the same problem, and can report it
    check_room(coming, session.store.root)
    if session.builder.cluster is not None:
        session.builder.cluster.check(session.graph, missing)


def _publisher(session: Session, variables: Variables, console: Console) -> Publish:
    """What publishes a recipe. Raises MlcBuildError where it cannot know where to."""
    from mlcbuild.workspace.publish import Publisher, place

    where = place(variables.namespace, variables.libraries, variables.upload, variables.private)
    publisher = Publisher(session, where)
    console.at_end.append(publisher.finish)
    return publisher.publish
