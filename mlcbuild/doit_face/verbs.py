"""doit's own verbs, led to the cache: `forget` removes action entries, `info` says why, `clean` removes packages."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

from doit.task import Task

from mlcbuild.doit_face.groups import GROUPS
from mlcbuild.doit_face.reporter import needs
from mlcbuild.doit_face.signals import for_doit
from mlcbuild.engine.why import why
from mlcbuild.workspace.install import uninstall
from mlcbuild.workspace.session import Session


def clean(session: Session, recipe: str, dryrun: bool) -> None:
    if (session.dist / recipe).exists():
        print(f"build:{recipe} - removing dist/{recipe}")
        if not dryrun:
            with for_doit():
                uninstall(session.dist, recipe)


def lead_to_cache(manager: Any, session: Session, everything: Callable[[], Session]) -> None:
    """Give doit's dependency manager of this run the cache's answers. `everything` opens all recipes."""
    ask = manager.get_status
    forced: set[str] | None = None

    @functools.cache
    def users() -> Mapping[str, list[str]]:
        """By step: the recipes that need it, of all that there are."""
        whole, found = everything(), dict[str, list[str]]()
        for recipe in whole.graph.goals:
            for step in whole.needed(recipe):
                found.setdefault(step, []).append(recipe)
        return found

    def get_status(task: Task, tasks: Mapping[str, Task], get_log: bool = False) -> Any:
        nonlocal forced
        status = ask(task, tasks, get_log)
        if get_log:  # `doit info`: the reasons are ours, and our notes on the task are nobody's business
            with for_doit():
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
        with for_doit():
            _forget(session, users, name)

    def forget_all() -> None:
        with for_doit():
            for name in session.graph.goals:
                session.forget(session.needed(name))

    manager.get_status = get_status
    manager.remove = forget
    manager.remove_all = forget_all
    manager.remove_success = lambda task: None  # a failure leaves nothing to forget


def _forced(tasks: Mapping[str, Task]) -> set[str]:
    """The tasks with `-a` after their name, and what they need."""
    named = {name for name, task in tasks.items() if task.options and task.options.get("always")}
    return named.union(*(needs(tasks, name) for name in named))


def _explain(session: Session, task: Task) -> None:
    """Why the task, or each task of a group, would run."""
    graph, names = session.graph, [task.name, *task.task_dep]
    recipes = [name.partition(":")[2] for name in names if name.startswith("build:")]
    unplanned = {**graph.unlocked, **graph.broken}
    sys.stdout.write("".join(f"\n{name}: {unplanned[name]}\n" for name in recipes if name in unplanned))
    goals = [name for name in recipes if name in graph.goals]
    steps = [task.name] if task.name in graph.steps else [step for step in task.task_dep if step in graph.steps]
    steps += [step for goal in goals for step in graph.goals[goal].steps.values()]
    sys.stdout.write("\n" + "".join(f"{answer}\n" for answer in why(session.lookup, steps)))
    for goal in goals:
        missing = "miss  dist/{}\n        not installed, or not what its manifest says\n"
        sys.stdout.write(("hit   dist/{}\n" if session.is_installed(goal) else missing).format(goal))


def _forget(session: Session, users: Callable[[], Mapping[str, list[str]]], name: str) -> None:
    """Forget a step, or all steps of a goal, and say which of those other recipes use too."""
    graph = session.graph
    recipe = name.removeprefix("build:")
    if name in GROUPS or (name.startswith("build:") and recipe not in graph.goals):
        return
    names = session.needed(recipe) if name.startswith("build:") else [name]
    for step in session.forget(names):
        others = [other for other in users().get(step, ()) if other != recipe]
        shared = f", which is shared with {', '.join(others)}" if others else ""
        print(f"forgetting {step}{shared}")
