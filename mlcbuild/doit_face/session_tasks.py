"""The steps and goals of a session as doit's tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from doit.exceptions import TaskError, TaskFailed
from doit.task import Task

from mlcbuild.doit_face.groups import ALWAYS, GROUPS, groups
from mlcbuild.doit_face.verbs import clean
from mlcbuild.engine.process import StepBroke
from mlcbuild.errors import MlcBuildError, StepFailed, plainly
from mlcbuild.reporting.events import StepFinished
from mlcbuild.workspace.session import Session

Publish = Callable[[str, bool], None]


def tasks_of(session: Session, publish: Publish | None) -> list[Task]:
    """`publish` brings a recipe to a hub; None where nobody asked for that. It always looks at what is there."""
    graph, docs = session.graph, GROUPS
    steps = [
        _task(
            name,
            docs.get(step.kind, step.kind),
            step.producers,
            partial(session.builder.build, name),
            partial(session.is_built, name),
        )
        for name, step in graph.steps.items()
    ]
    publishing = [
        _task(f"publish:{name}", docs["publish"], [f"build:{name}"], partial(publish or _not_asked, name))
        for name in graph.goals
    ]
    goals = [_goal(session, name) for name in (*graph.goals, *graph.unlocked, *graph.broken)]
    return [*goals, *steps, *publishing, *_groups(session)]


def _goal(session: Session, name: str) -> Task:
    """A recipe's package. A recipe whose model is not locked yet, or cannot be planned, has no steps and fails."""
    graph, recipe = session.graph, session.catalog.recipes[name]
    what = f"{recipe.model.name} in {recipe.quantization.name} for {recipe.target.name} ({recipe.origin}"
    task = partial(_task, f"build:{name}", clean=[(clean, [session, name])])
    if name in graph.goals:
        steps = graph.goals[name].steps.values()
        return task(f"{what})", steps, partial(session.install, name), partial(session.is_installed, name))
    state = "unknown until locked" if name in graph.unlocked else "broken"
    text = graph.unlocked.get(name) or graph.broken[name]
    return task(f"{what}; {state})", [], partial(_refuse, session, name, text))


def _refuse(session: Session, recipe: str, text: str, forced: bool) -> None:
    session.builder.report(StepFinished(f"build:{recipe}", "build", "failed", 0.0, 0, text))
    raise StepFailed(text)


def _not_asked(recipe: str, forced: bool) -> None:
    raise StepFailed(f"publish:{recipe}: ask for it by its name: doit publish recipe={recipe}")


def _groups(session: Session) -> list[Task]:
    """`doit quantize`: the recipes' own steps of a kind, without those that only their verification needs.

    Recipes that cannot be planned fail whatever was asked for, after what can be done.
    """
    goals = session.graph.goals
    members = {kind: [goal.steps[kind] for goal in goals.values() if kind in goal.steps] for kind in GROUPS}
    members |= {kind: [f"{kind}:{name}" for name in goals] for kind in ("publish", "build")}
    unplanned = [f"build:{name}" for name in (*session.graph.unlocked, *session.graph.broken)]
    return groups({kind: [*dict.fromkeys(names), *unplanned] for kind, names in members.items()})


class _Task(Task):  # type: ignore[misc]
    """One of very many, whose attributes are of the right types."""

    check_attr = staticmethod(lambda *_: None)


def _task(
    name: str,
    doc: str,
    needs: Iterable[str],
    do: Callable[[bool], Any],
    is_done: Callable[[], bool] = lambda: False,
    clean: Sequence[Any] = (),
) -> Task:
    """`do` is told whether it was forced; what it raises is for the user."""

    def uptodate() -> bool:
        try:
            with plainly():
                return is_done()
        except MlcBuildError:
            return False  # the action meets the same problem, and can report it

    def act(task: Task) -> Any:
        try:
            with plainly():
                do(task.meta["forced"])
        except MlcBuildError as error:
            return (TaskError if isinstance(error, StepBroke) else TaskFailed)(str(error))
        return None

    return _Task(
        name,
        [act],
        task_dep=list(needs),
        uptodate=[uptodate],
        clean=clean,
        subtask_of=name.partition(":")[0],
        io={"capture": False},
        params=[ALWAYS],
        doc=doc,
        meta={"forced": False},
    )
