"""The doit face: steps and goals as doit's tasks. A workspace's dodo.py is `from mlcbuild.tasks import *`.

The cache owns correctness; doit's database is in memory and is never asked. Each task's `uptodate` is the cache's
answer, and doit's own verbs are led to the cache: `forget` removes action entries, `info` says what `mlcbuild why`
says, `clean` removes what is in dist/, and `-a` runs steps that the cache has.
"""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doit import doit_cmd, loader
from doit.exceptions import InvalidCommand, TaskError, TaskFailed
from doit.globals import Globals
from doit.task import Task

from mlcbuild.cache.runs import begin
from mlcbuild.errors import MlcBuildError, StepFailed
from mlcbuild.execution.install import uninstall
from mlcbuild.execution.plan import check_room, preview
from mlcbuild.execution.process import StepBroke
from mlcbuild.execution.recording import completed, planned, planned_in, reasons
from mlcbuild.execution.resources import Pool, budget
from mlcbuild.execution.scope import Scope, scope_of
from mlcbuild.execution.session import Session, open_session
from mlcbuild.execution.signals import die_with_parent_after_fork, end_cleanly
from mlcbuild.execution.unchanged import recall, remember
from mlcbuild.execution.variables import Variables, keeps_going, on_cluster, read_patience, read_variables
from mlcbuild.execution.why import why
from mlcbuild.recipes.select import Wanted, choose
from mlcbuild.reporting.doit_reporter import Console, needs, reporter_class
from mlcbuild.reporting.events import Event, PackageInstalled, RecipeUnavailable, StepFinished
from mlcbuild.reporting.jsonlog import json_log

if TYPE_CHECKING:
    from mlcbuild.execution.cluster import Cluster
    from mlcbuild.execution.shared import SharedCache

__all__ = ["DOIT_CONFIG", "task_steps"]

_GROUPS = {
    "build": "build packages into dist/",
    "download": "fetch checkpoints",
    "convert": "bring checkpoints under the model's parameter names",
    "calibrate": "measure what the model's matrices are multiplied with",
    "quantize": "make the weights only",
    "lower": "make optimised modules",
    "runtime": "compile TVM's runtime for browsers",
    "library": "make the libraries only",
    "package": "put weights, tokenizer and library together",
    "verify": "check packages against the unquantized model",
    "publish": "upload verified packages to a hub; upload=1, without it only say what would be uploaded",
}
_ALWAYS = {
    "name": "always",
    "short": "a",
    "long": "always-execute",
    "type": bool,
    "default": False,
    "help": "run the steps even if the cache has them",
}
_LOG_JSON = {
    "name": "log_json",
    "long": "log-json",
    "type": str,
    "default": "",
    "help": "append one JSON object per event to this file (also: log_json=FILE, or MLCBUILD_LOG_JSON)",
}

_console = Console()
_reasons: dict[str, str] = {}  # why steps of this run had to run

DOIT_CONFIG = {
    "default_tasks": ["build"],
    "backend": "sqlite3",
    "dep_file": ":memory:",
    "par_type": "thread",  # steps are processes already
    # So many threads wait for room on the machine (execution.resources), which is what decides how many steps run.
    "num_process": 512 if on_cluster(sys.argv[1:]) else 32,
    "continue": keeps_going(sys.argv[1:]),
    "reporter": reporter_class(_console),
    "verbosity": 2,
}


def task_steps() -> Iterator[Task]:
    """All steps and goals of the selected recipes."""
    end_cleanly()
    die_with_parent_after_fork()
    try:
        variables = read_variables(doit_cmd._CMDLINE_VARS or {}, Path(loader.initial_workdir or "."))
        _record(variables)
        began = time.time()
        if _only_builds(sys.argv[1:]):
            hits = _unchanged(variables)
            if hits is not None:
                _console.hits = hits
                _console.at_end.append(lambda: _write_reports(variables))
                return (group for group in _empty_groups())
        scope = scope_of(sys.argv[1:], _GROUPS)
        session = _open(variables, variables.wanted, scope, keep_going=not scope.runs or keeps_going(sys.argv[1:]))
        if scope.runs and session.graph.broken and not session.graph.goals:
            raise MlcBuildError("\n".join(dict.fromkeys(session.graph.broken.values())))
        begin(session.store.root, session.store.save_counts)
        _console.at_start.append(partial(_before, session))
        _console.at_end += [lambda: remember(session, began), lambda: _write_reports(variables)]
        publishing = _publishing(session, variables, sys.argv[1:])
        tasks = [*_goals(session), *_unplanned(session), *_steps(session), *publishing, *_groups(session)]
        _check_names(sys.argv[1:], {task.name for task in tasks}, session)
    except MlcBuildError as error:
        raise InvalidCommand(str(error)) from None
    _lead_to_cache(Globals.dep_manager, session, lambda: _open(variables, None, Scope(), keep_going=True))
    return (task for task in tasks)


def _open(variables: Variables, recipes: Wanted | None, scope: Scope, keep_going: bool) -> Session:
    shared = _shared(variables)
    return open_session(
        Path.cwd(),
        _console.report,
        recipes,
        variables.cache,
        variables.debug_dump,
        strict=variables.strict,
        locked=variables.locked,
        shared=shared,
        scope=scope,
        keep_going=keep_going,
        pool=Pool(budget(variables.cores, variables.memory).totals()),
        cluster=_cluster(variables, shared) if scope.runs else None,
    )


def _shared(variables: Variables) -> SharedCache | None:
    if variables.remote is None:
        return None
    from mlcbuild.execution.shared import open_shared

    return open_shared(variables.remote, variables.remote_write, read_patience())


def _cluster(variables: Variables, shared: SharedCache | None) -> Cluster | None:
    if variables.scheduler is None or shared is None:
        return None
    from mlcbuild.execution.cluster import Cluster

    cluster = Cluster(variables.scheduler, shared, read_patience("MLCBUILD_SCHEDULER_TIMEOUT", "30"))
    _console.at_end.append(cluster.close)
    return cluster


def _only_builds(arguments: Sequence[str]) -> bool:
    """Whether doit was asked for nothing but to build packages, as far as they need it."""
    words = [word for word in arguments if "=" not in word or word.startswith("-")]
    return all(word in ("run", "build", "--continue", "-c") for word in words)


def _unchanged(variables: Variables) -> list[Event] | None:
    """What there is to say where all that is wanted is known to be up to date; None where it has to be looked at."""
    if variables.wanted.changed is not None:
        return None
    root = Path.cwd()
    memory = recall(root, variables.cache or root / "cache")
    if memory is None:
        return None
    names = choose(memory.recipes, variables.wanted, memory.manual)
    missing = [name for name in names if name in memory.unavailable]
    demanded = (variables.wanted.recipe or "").split(",")
    if missing and (variables.strict or any(name.strip() in missing for name in demanded)):
        return None
    names = [name for name in names if name not in memory.unavailable]
    if not memory.hold(names):
        return None
    if _console.records:
        cells = {name: memory.recipes[name] for name in (*names, *missing)}
        for event in planned(cells, lambda name: memory.step_names([name]) if name in names else ()):
            _console.record(event)
    return [
        *(RecipeUnavailable(name, memory.unavailable[name]) for name in missing),
        *(StepFinished(step, step.partition(":")[0], "hit", 0.0, 0) for step in memory.step_names(names)),
        *(PackageInstalled(name, f"dist/{name}", "hit", 0) for name in names),
    ]


def _record(variables: Variables) -> None:
    """Open what is to be written besides the screen."""
    if variables.log_json is not None:
        _console.log = json_log(variables.log_json)
    if variables.report is not None or variables.summary is not None:
        _console.collected = []
    _console.complete = completed(Path.cwd() / "dist", _reasons)


def _before(session: Session, tasks: Mapping[str, Task], selected: Sequence[str]) -> None:
    """What comes between planning and building. Raises MlcBuildError where the disk is too small for it."""
    _log_where_asked(tasks)
    if _console.records:
        for event in planned_in(session):
            _console.record(event)
    names = {name for wanted in selected for name in (wanted, *needs(tasks, wanted))} & session.graph.steps.keys()
    try:
        missing = [name for name in session.graph.steps if name in names and not session.is_built(name)]
        if not missing:
            return
        if _console.records:
            _reasons.update(reasons(session, missing))
        coming = preview(session, missing)
    except MlcBuildError:
        return  # the step meets the same problem, and can report it
    check_room(coming, session.store.root)
    if session.builder.cluster is not None:
        session.builder.cluster.check(session.graph, missing)


def _write_reports(variables: Variables) -> None:
    """The pages of this run. Raises MlcBuildError where one cannot be written."""
    from mlcbuild.execution.pages import write_page, write_report
    from mlcbuild.reporting.history import read_logs, runs_of
    from mlcbuild.reporting.summary import markdown

    if not _console.collected:
        return
    runs = runs_of(_console.collected)
    if variables.report is not None:  # a log that other runs are in too gives the page its trends
        write_report(variables.report, read_logs([variables.log_json]) if variables.log_json else runs)
    if variables.summary is not None:
        write_page(variables.summary, markdown(runs))


def _empty_groups() -> list[Task]:
    return [Task(kind, None, has_subtask=True, doc=doc, params=[_ALWAYS, _LOG_JSON]) for kind, doc in _GROUPS.items()]


def _goals(session: Session) -> Iterator[Task]:
    for name, goal in session.graph.goals.items():
        recipe = goal.recipe
        doc = f"{recipe.model.name} in {recipe.quantization.name} for {recipe.target.name} ({recipe.origin})"
        yield _task(
            f"build:{name}",
            doc,
            list(goal.steps.values()),
            partial(session.is_installed, name),
            partial(session.install, name),
            clean=[(_clean, [session, name])],
        )


def _unplanned(session: Session) -> Iterator[Task]:
    """Goals without steps: recipes whose model is not locked yet, or cannot be planned."""
    for name, text in {**session.graph.unlocked, **session.graph.broken}.items():
        recipe = session.catalog.recipes[name]
        state = "unknown until locked" if name in session.graph.unlocked else "broken"
        yield _task(
            f"build:{name}",
            f"{recipe.model.name} in {recipe.quantization.name} for {recipe.target.name} ({recipe.origin}; {state})",
            [],
            lambda: False,
            partial(_refuse, session, name, text),
            clean=[(_clean, [session, name])],
        )


def _refuse(session: Session, recipe: str, text: str, forced: bool) -> None:
    session.builder.report(StepFinished(f"build:{recipe}", "build", "failed", 0.0, 0, text))
    raise StepFailed(text)


def _steps(session: Session) -> Iterator[Task]:
    for name, step in session.graph.steps.items():
        yield _task(
            name,
            _GROUPS.get(step.kind, step.kind),
            list(step.producers),
            partial(session.is_built, name),
            partial(session.builder.build, name),
        )


def _publishing(session: Session, variables: Variables, words: Sequence[str]) -> list[Task]:
    """`publish:<recipe>`, which always looks at what is on the hub. Raises MlcBuildError where it cannot know which."""
    publish: Callable[[str, bool], None] = _not_asked
    if any(word.partition(":")[0] == "publish" for word in words) and "list" not in words and "info" not in words:
        from mlcbuild.execution.publish import Publisher, place

        where = place(variables.namespace, variables.libraries, variables.upload, variables.private)
        publisher = Publisher(session, where)
        publish = publisher.publish
        _console.at_end.append(publisher.finish)
    return [
        _task(f"publish:{name}", _GROUPS["publish"], [f"build:{name}"], lambda: False, partial(publish, name))
        for name in session.graph.goals
    ]


def _not_asked(recipe: str, forced: bool) -> None:
    raise StepFailed(f"publish:{recipe}: ask for it by its name: doit publish recipe={recipe}")


def _groups(session: Session) -> Iterator[Task]:
    """`doit quantize`: the recipes' own steps of a kind, without those that only their verification needs.

    Recipes that cannot be planned fail whatever was asked for, after what can be done.
    """
    goals = session.graph.goals
    unplanned = [f"build:{name}" for name in (*session.graph.unlocked, *session.graph.broken)]
    for kind, doc in _GROUPS.items():
        if kind == "publish":
            members = [f"publish:{name}" for name in goals]
        elif kind == "build":
            members = [f"build:{name}" for name in goals]
        else:
            members = list(dict.fromkeys(goal.steps[kind] for goal in goals.values() if kind in goal.steps))
        yield Task(kind, None, task_dep=[*members, *unplanned], has_subtask=True, doc=doc, params=[_ALWAYS, _LOG_JSON])


def _task(
    name: str,
    doc: str,
    task_dep: Sequence[str],
    is_done: Callable[[], bool],
    do: Callable[[bool], Any],
    clean: Sequence[Any] = (),
) -> Task:
    def uptodate() -> bool:
        try:
            return is_done()
        except MlcBuildError:
            return False  # the action meets the same problem, and can report it

    def act(task: Task) -> Any:
        try:
            do(task.meta["forced"])
        except MlcBuildError as error:
            return (TaskError if isinstance(error, StepBroke) else TaskFailed)(str(error))
        return None

    return Task(
        name,
        [act],
        task_dep=task_dep,
        uptodate=[uptodate],
        clean=clean,
        subtask_of=name.partition(":")[0],
        io={"capture": False},
        params=[_ALWAYS],
        doc=doc,
        meta={"forced": False},
    )


def _clean(session: Session, recipe: str, dryrun: bool) -> None:
    if (session.dist / recipe).exists():
        print(f"build:{recipe} - removing dist/{recipe}")
        if not dryrun:
            uninstall(session.dist, recipe)


def _lead_to_cache(manager: Any, session: Session, everything: Callable[[], Session]) -> None:
    """Give doit's dependency manager of this run the cache's answers. `everything` opens all recipes."""
    ask = manager.get_status
    forced: set[str] | None = None

    def get_status(task: Task, tasks: Mapping[str, Task], get_log: bool = False) -> Any:
        nonlocal forced
        status = ask(task, tasks, get_log)
        if get_log:  # `doit info`: the reasons are ours, and our notes on the task are nobody's business
            _explain(session, task)
            status.reasons.clear()
            task.meta, task.params = None, []
        if forced is None:
            forced = _forced(tasks)
        if task.meta is not None:
            # doit also runs a task that is up to date: `-a` before the task's name. Both ways mean the same.
            task.meta["forced"] = status.status == "up-to-date"
        if task.name in forced:
            status.status = "run"
        return status

    def forget(name: str) -> None:
        _forget(session, everything(), name)

    def forget_all() -> None:
        for name in session.graph.goals:
            session.forget(session.graph.closure(session.graph.goals[name].steps.values()))

    manager.get_status = get_status
    manager.remove = forget
    manager.remove_all = forget_all
    manager.remove_success = lambda task: None  # a failure leaves nothing to forget


def _log_where_asked(tasks: Mapping[str, Task]) -> None:
    """`--log-json FILE` after a task's name."""
    for task in tasks.values():
        if task.options and task.options.get("log_json"):
            _console.log = json_log(Path(loader.initial_workdir or ".", task.options["log_json"]).absolute())


def _forced(tasks: Mapping[str, Task]) -> set[str]:
    """The tasks with `-a` after their name, and what they need."""
    named = {name for name, task in tasks.items() if task.options and task.options.get("always")}
    return named.union(*(needs(tasks, name) for name in named))


def _explain(session: Session, task: Task) -> None:
    steps = [task.name] if task.name in session.graph.steps else task.task_dep
    goals = [name.partition(":")[2] for name in (task.name, *task.task_dep) if name.startswith("build:")]
    steps = [step for step in steps if step in session.graph.steps]
    unplanned = {**session.graph.unlocked, **session.graph.broken}
    sys.stdout.write("".join(f"\n{goal}: {unplanned[goal]}\n" for goal in goals if goal in unplanned))
    goals = [goal for goal in goals if goal in session.graph.goals]
    steps += [step for goal in goals for step in session.graph.goals[goal].steps.values()]
    sys.stdout.write("\n" + "".join(f"{answer}\n" for answer in why(session.lookup, steps)))
    for goal in goals:
        if session.is_installed(goal):
            sys.stdout.write(f"hit   dist/{goal}\n")
        else:
            sys.stdout.write(f"miss  dist/{goal}\n        not installed, or not what its manifest says\n")


def _forget(session: Session, everything: Session, name: str) -> None:
    """Forget a step, or all steps of a goal, and say which of those other recipes use too."""
    graph = session.graph
    recipe = name.removeprefix("build:")
    if name in _GROUPS or (name.startswith("build:") and recipe not in graph.goals):
        return
    names = graph.closure(graph.goals[recipe].steps.values()) if name.startswith("build:") else [name]
    for step in session.forget(names):
        users = [
            other
            for other, goal in everything.graph.goals.items()
            if other != recipe and step in everything.graph.closure(goal.steps.values())
        ]
        shared = f", which is shared with {', '.join(users)}" if users else ""
        print(f"forgetting {step}{shared}")


def _check_names(arguments: Sequence[str], tasks: set[str], session: Session) -> None:
    """doit passes over a pattern that matches nothing, and has no suggestions. Raises MlcBuildError."""
    for argument in arguments:
        kind, colon, name = argument.partition(":")
        if not colon or kind not in _GROUPS or "=" in argument:
            continue
        if argument in tasks or ("*" in argument and any(fnmatch(task, argument) for task in tasks)):
            continue
        if kind == "build" and name in session.graph.unavailable:
            raise MlcBuildError(f"{name}: unavailable: {session.graph.unavailable[name]}")
        close = difflib.get_close_matches(argument, sorted(task for task in tasks if ":" in task), n=1)
        hint = f": did you mean {close[0]}?" if close else "; `doit list --all` shows the tasks"
        raise MlcBuildError(f"no task is called {argument}{hint}")
