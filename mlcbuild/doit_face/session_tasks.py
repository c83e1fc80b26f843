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


def tasks_of(session: Session, publish: Publish | None, whole: Callable[[], Session]) -> list[Task]:
    """`publish` brings a recipe to a hub; None where nobody asked for that. It always looks at what is there.

    `whole` gives the session that tasks are run with, or are asked whether they are up to date, where `session` has
    their names only.
    """
    graph, docs = session.graph, GROUPS
    steps = [_Task(name, docs.get(step.kind, step.kind), _of_step, whole, name) for name, step in graph.steps.items()]
    bring = publish or _not_asked
    publishing = [_Task(f"publish:{name}", docs["publish"], _of_publishing, bring, name) for name in graph.goals]
    goals = [_goal(session, name, whole) for name in (*graph.goals, *graph.unlocked, *graph.broken)]
    return [*goals, *steps, *publishing, *_groups(session)]


def _goal(session: Session, name: str, whole: Callable[[], Session]) -> Task:
    """A recipe's package. A recipe whose model is not locked yet, or cannot be planned, has no steps and fails."""
    graph, recipe = session.graph, session.catalog.recipes[name]
    what = f"{recipe.model.name} in {recipe.quantization.name} for {recipe.target.name} ({recipe.origin}"
    if name in graph.goals:
        return _Task(f"build:{name}", f"{what})", _of_goal, whole, name)
    state = "unknown until locked" if name in graph.unlocked else "broken"
    return _Task(f"build:{name}", f"{what}; {state})", _of_unplanned, whole, name)


def _of_step(whole: Callable[[], Session], name: str) -> dict[str, Any]:
    session = whole()
    needs = session.graph.steps[name].producers
    return _acting(needs, partial(session.builder.build, name), partial(session.is_built, name))


def _of_publishing(publish: Publish, name: str) -> dict[str, Any]:
    return _acting([f"build:{name}"], partial(publish, name))


def _of_goal(whole: Callable[[], Session], name: str) -> dict[str, Any]:
    session = whole()
    steps, done = session.graph.goals[name].steps.values(), partial(session.is_installed, name)
    return _acting(steps, partial(session.install, name), done, [(clean, [session, name])])


def _of_unplanned(whole: Callable[[], Session], name: str) -> dict[str, Any]:
    session = whole()
    text = session.graph.unlocked.get(name) or session.graph.broken[name]
    return _acting([], partial(_refuse, session, name, text), clean=[(clean, [session, name])])


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
    """One of very many. What makes it run, as `how(*of)` gives it, is looked for when doit asks for anything but its
    name and what it is: `doit list` does not. To run tasks, or to show their states, doit asks it of all."""

    check_attr = staticmethod(lambda *_: None)  # what we give it is of the right types

    def __init__(self, name: str, doc: str, how: Callable[..., dict[str, Any]], *of: Any) -> None:
        self.name, self.doc, self.subtask_of, self.has_subtask = name, doc, name.partition(":")[0], False
        self.rest = (how, of)

    def __getattr__(self, attribute: str) -> Any:
        rest = self.__dict__.pop("rest", None)
        if rest is not None:
            how, of = rest
            super().__init__(self.name, subtask_of=self.subtask_of, doc=self.doc, **how(*of))
        try:
            return self.__dict__[attribute]
        except KeyError:
            raise AttributeError(attribute) from None


def _acting(
    needs: Iterable[str],
    do: Callable[[bool], Any],
    is_done: Callable[[], bool] = lambda: False,
    clean: Sequence[Any] = (),
) -> dict[str, Any]:
    """A task's attributes. `do` is told whether it was forced; what it raises is for the user."""

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

    return {
        "actions": [act],
        "task_dep": list(needs),
        "uptodate": [uptodate],
        "clean": clean,
        "io": {"capture": False},
        "params": [ALWAYS],
        "meta": {"forced": False},
    }
