"""doit's reporter interface, in terms of mlcbuild's events."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from doit.exceptions import InvalidCommand, TaskFailed, UnmetDependency
from doit.reporter import ConsoleReporter

from mlcbuild.doit_face.signals import for_doit, outlive_reader
from mlcbuild.errors import MlcBuildError, plainly
from mlcbuild.reporting.events import (
    Event,
    PackageInstalled,
    RecipeUnavailable,
    Report,
    RunFinished,
    StepFinished,
)


class Console:
    """Where the events of this run go: the JSON log, if there is one, and the screen, once doit has chosen us."""

    def __init__(self) -> None:
        self.log: Report | None = None
        self.collected: list[tuple[float, Event]] | None = None  # for the reports of this run
        self.annotate: Callable[[Event], Event] = lambda event: event  # what logs and reports are told in addition
        self.reasons: dict[str, str] = {}  # why steps of this run have to run
        self.hits: list[Event] = []  # what was found up to date before doit looked
        # Called with all tasks and the names of those that were asked for. Raises MlcBuildError to stop the build.
        self.at_start: list[Callable[[Mapping[str, Any], list[str]], None]] = []
        self.at_end: list[Callable[[], None]] = []  # each may raise MlcBuildError
        self._early: list[Event] = []
        self._show: Report = self._early.append

    def report(self, event: Event) -> None:
        self.record(event)
        self._show(event)

    @property
    def records(self) -> bool:
        """Whether a log or a report was asked for."""
        return self.log is not None or self.collected is not None

    def record(self, event: Event) -> None:
        """Tell the log and the reports, not the screen."""
        if self.records:
            event = self.annotate(event)
        log = self.log  # another thread may be the one that finds that it cannot be written
        if log is not None:
            try:
                log(event)
            except MlcBuildError as error:  # said once, at the end: the build itself goes on
                if self.log is not None:
                    self.at_end.append(partial(_fail, error))
                self.log = None
        if self.collected is not None:
            self.collected.append((time.time(), event))

    def show_on(self, screen: Report) -> None:
        """Show events on `screen` from now on, and what has happened so far."""

        def show(event: Event) -> None:
            with outlive_reader():
                screen(event)

        self._show = show
        for event in self._early:
            show(event)


def _fail(error: MlcBuildError) -> None:
    raise error


def reporter_class(console: Console) -> type[ConsoleReporter]:
    """A doit reporter that sends everything to `console`."""

    class Reporter(ConsoleReporter):  # type: ignore[misc]
        desc = "mlcbuild's own: a line per event, or live bars on a terminal"

        def __init__(self, outstream: Any, options: Mapping[str, Any]) -> None:
            outstream = outstream or sys.stdout  # it was closed when doit began, and leads nowhere now
            super().__init__(outstream, options)
            from mlcbuild.reporting.screen import screen

            console.show_on(screen(outstream))
            self.tasks: Mapping[str, Any] = {}
            self.failed: set[str] = set()
            self.broke = False  # a bug, a killed process: doit's status 2
            self.wanted: list[str] = []
            self.not_built: list[str] = []
            self.messages: list[str] = []
            self.started = time.monotonic()
            self.counts = dict.fromkeys(("built", "hit", "failed", "skipped"), 0)

        def initialize(self, tasks: Mapping[str, Any], selected_tasks: list[str]) -> None:
            if not selected_tasks:
                raise InvalidCommand("no task matches; `doit list --all` shows the tasks")
            self.tasks = tasks
            wanted = {name for chosen in selected_tasks for name in (chosen, *needs(tasks, chosen))}
            self.wanted = sorted(name for name in wanted if name.startswith("build:"))
            with for_doit():
                for start in console.at_start:
                    start(tasks, selected_tasks)
            for event in console.hits:
                self.counts["hit"] += not isinstance(event, RecipeUnavailable)
                console.report(event)

        def write(self, text: str) -> None:
            with outlive_reader():
                super().write(text)
                self.outstream.flush()

        def execute_task(self, task: Any) -> None:
            pass  # the step reports its own start

        def skip_uptodate(self, task: Any) -> None:
            self.counts["hit"] += 1
            kind, _, name = task.name.partition(":")
            if kind == "build":
                console.report(PackageInstalled(name, f"dist/{name}", "hit", 0))
            else:
                console.report(StepFinished(task.name, kind, "hit", 0.0, 0))

        def add_success(self, task: Any) -> None:
            if not task.has_subtask:
                self.counts["built"] += 1

        def add_failure(self, task: Any, fail: Any) -> None:
            if task.name.startswith("build:"):
                self.not_built.append(task.name)
            if not isinstance(fail, UnmetDependency):
                self.broke |= not isinstance(fail, TaskFailed)
                self.counts["failed"] += 1
                self.failed.add(task.name)
                self.messages.append(f"{fail.message}{''.join(fail.traceback)}")
                return
            self.counts["skipped"] += not task.has_subtask
            done = {"build": "built", "publish": "published"}.get(task.name.partition(":")[0])
            if done and ":" in task.name:
                roots = ", ".join(sorted(self.failed & needs(self.tasks, task.name)))
                self.messages.append(f"{task.name}: not {done}, because of {roots}")

        def complete_run(self) -> None:
            console.report(RunFinished(round(time.monotonic() - self.started, 3), **self.counts))
            for text in [*self.messages, *self.runtime_errors]:
                self.write(f"{text}\n")
            if self.not_built and len(self.wanted) > 1:
                self.write(f"{len(self.not_built)} of {len(self.wanted)} recipes failed: {_some(self.not_built)}\n")
            wrong = bool(self.failed or self.not_built)
            for end in console.at_end:
                try:
                    with plainly():
                        end()
                except MlcBuildError as error:
                    wrong = True
                    self.write(f"{error}\n")
            # doit calls it broken (2) where something was left out because of a failure; to us that failure is all.
            # A build that is being ended by a signal keeps the status of that.
            if wrong and not self.broke and not self.runtime_errors and sys.exc_info()[0] is None:
                raise SystemExit(1)

    return Reporter


def _some(names: list[str], most: int = 10) -> str:
    """The first names of a list that may be long."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name.partition(":")[2] for name in names[:most]) + more


def needs(tasks: Mapping[str, Any], name: str) -> set[str]:
    """The names of all tasks that the task called `name` depends on, directly or not."""
    found: set[str] = set()
    waiting = list(tasks[name].task_dep)
    while waiting:
        need = waiting.pop()
        if need not in found:
            found.add(need)
            waiting += tasks[need].task_dep
    return found
