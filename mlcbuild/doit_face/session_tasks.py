"""The steps and goals of a session as doit's tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from doit.exceptions import TaskError, TaskFailed
from doit.task import Task

from mlcbuild.doit_face.groups import ALWAYS, GROUPS, groups
from mlcbuild.doit_face.verbs import clean
from mlcbuild.engine.process import StepBroke
from mlcbuild.errors import MlcBuildError, StepFailed
from mlcbuild.reporting.events import StepFinished
from mlcbuild.workspace.session import Session

Publish = Callable[[str, bool], None]


def tasks_of(session: Session, publish: Publish | None) -> list[Task]:
    """`publish` brings a recipe to a hub; None where nobody asked for that. It always looks at what is there."""
    publishing = [
        _task(
            f"publish:{name}", GROUPS["publish"], [f"build:{name}"], lambda: False, partial(publish or _not_asked, name)
        )
        for name in session.graph.goals
    ]
    return [*_goals(session), *_unplanned(session), *_steps(session), *publishing, *_groups(session)]


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
            clean=[(clean, [session, name])],
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
            clean=[(clean, [session, name])],
        )


def _refuse(session: Session, recipe: str, text: str, forced: bool) -> None:
    session.builder.report(StepFinished(f"build:{recipe}", "build", "failed", 0.0, 0, text))
    raise StepFailed(text)


def _steps(session: Session) -> Iterator[Task]:
    for name, step in session.graph.steps.items():
        yield _task(
            name,
            GROUPS.get(step.kind, step.kind),
            list(step.producers),
            partial(session.is_built, name),
            partial(session.builder.build, name),
        )


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
        params=[ALWAYS],
        doc=doc,
        meta={"forced": False},
    )
