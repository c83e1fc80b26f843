"""What a run of doit does with a session: opened by the command line's words, looked at before, reported after."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from doit import loader
from doit.globals import Globals
from doit.task import Task

from mlcbuild.cache.runs import begin
from mlcbuild.doit_face.groups import GROUPS
from mlcbuild.doit_face.reporter import Console, needs
from mlcbuild.doit_face.session_tasks import Publish, check_names, tasks_of
from mlcbuild.doit_face.verbs import lead_to_cache
from mlcbuild.engine.resources import Pool, budget
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.select import Wanted
from mlcbuild.reporting.jsonlog import json_log
from mlcbuild.workspace.estimate import check_room, estimate
from mlcbuild.workspace.fastpath import remember
from mlcbuild.workspace.recording import planned_in, reasons
from mlcbuild.workspace.scope import Scope, scope_of
from mlcbuild.workspace.session import Session, open_session
from mlcbuild.workspace.variables import Variables, keeps_going, read_patience

if TYPE_CHECKING:
    from mlcbuild.engine.cluster import Cluster
    from mlcbuild.engine.shared import SharedCache


def open_run(variables: Variables, console: Console, why_so: dict[str, str], began: float) -> list[Task]:
    """All tasks of this run, after arranging what comes before and after them.

    `why_so` is filled with why steps of this run have to run; `began` is when. Raises MlcBuildError.
    """
    words = sys.argv[1:]
    scope = scope_of(words, GROUPS)
    session = _open(variables, console, variables.wanted, scope, keep_going=not scope.runs or keeps_going(words))
    if scope.runs and session.graph.broken and not session.graph.goals:
        raise MlcBuildError("\n".join(dict.fromkeys(session.graph.broken.values())))
    begin(session.store.root, session.store.save_counts)
    console.at_start.append(partial(_before, session, console, why_so))
    console.at_end.append(lambda: remember(session, began))
    tasks = tasks_of(session, _publish(session, variables, console, words))
    check_names(words, {task.name for task in tasks}, session)
    lead_to_cache(Globals.dep_manager, session, lambda: _open(variables, console, None, Scope(), keep_going=True))
    return tasks


def _open(variables: Variables, console: Console, recipes: Wanted | None, scope: Scope, keep_going: bool) -> Session:
    shared = _shared(variables)
    return open_session(
        Path.cwd(),
        console.report,
        recipes,
        variables.cache,
        variables.debug_dump,
        strict=variables.strict,
        locked=variables.locked,
        shared=shared,
        scope=scope,
        keep_going=keep_going,
        pool=Pool(budget(variables.cores, variables.memory).totals()),
        cluster=_cluster(variables, console, shared) if scope.runs else None,
    )


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


def _before(
    session: Session, console: Console, why_so: dict[str, str], tasks: Mapping[str, Task], selected: Sequence[str]
) -> None:
    """What comes between planning and building. Raises MlcBuildError where the disk is too small for it."""
    _log_where_asked(console, tasks)
    if console.records:
        for event in planned_in(session):
            console.record(event)
    names = {name for wanted in selected for name in (wanted, *needs(tasks, wanted))} & session.graph.steps.keys()
    try:
        missing = [name for name in session.graph.steps if name in names and not session.is_built(name)]
        if not missing:
            return
        if console.records:
            why_so.update(reasons(session, missing))
        coming = estimate(session, missing)
    except MlcBuildError:
        return  # the step meets the same problem, and can report it
    check_room(coming, session.store.root)
    if session.builder.cluster is not None:
        session.builder.cluster.check(session.graph, missing)


def _log_where_asked(console: Console, tasks: Mapping[str, Task]) -> None:
    """`--log-json FILE` after a task's name."""
    for task in tasks.values():
        if task.options and task.options.get("log_json"):
            console.log = json_log(Path(loader.initial_workdir or ".", task.options["log_json"]).absolute())


def _publish(session: Session, variables: Variables, console: Console, words: Sequence[str]) -> Publish | None:
    """What publishes a recipe, where that is asked for. Raises MlcBuildError where it cannot know where to."""
    if not any(word.partition(":")[0] == "publish" for word in words) or "list" in words or "info" in words:
        return None
    from mlcbuild.workspace.publish import Publisher, place

    where = place(variables.namespace, variables.libraries, variables.upload, variables.private)
    publisher = Publisher(session, where)
    console.at_end.append(publisher.finish)
    return publisher.publish
