"""The doit face: steps and goals as doit's tasks. A workspace's dodo.py is `from mlcbuild.tasks import *`.

The cache owns correctness; doit's database is in memory and is never asked. Each task's `uptodate` is the cache's
answer, and doit's own verbs are led to the cache: `forget` removes action entries, `info` says what `mlcbuild why`
says, `clean` removes what is in dist/, and `-a` runs steps that the cache has.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from doit import doit_cmd, loader
from doit.task import Task

from mlcbuild.doit_face.argv import keeps_going, named_tasks, on_cluster, only_builds
from mlcbuild.doit_face.groups import groups
from mlcbuild.doit_face.reporter import Console, reporter_class
from mlcbuild.doit_face.signals import (
    die_with_parent_after_fork,
    end_cleanly,
    end_with_reader,
    for_doit,
    start_in_words,
)
from mlcbuild.doit_face.variables import Variables, read_variables
from mlcbuild.reporting.events import Event, PackageInstalled, RecipeUnavailable, StepFinished, json_log
from mlcbuild.streams import open_streams
from mlcbuild.workspace.fastpath import recall
from mlcbuild.workspace.reports import annotator, planned

__all__ = ["DOIT_CONFIG", "task_steps"]

_console = Console()

DOIT_CONFIG = {
    "default_tasks": ["build"],
    "backend": "sqlite3",
    "dep_file": ":memory:",
    "par_type": "thread",  # steps are processes already
    # So many threads wait for room on the machine (engine.resources), which is what decides how many steps run.
    "num_process": 512 if on_cluster(sys.argv[1:]) else 32,
    "continue": keeps_going(sys.argv[1:]),
    "reporter": reporter_class(_console),
    "verbosity": 2,
}


def task_steps() -> Iterator[Task]:
    """All steps and goals of the selected recipes."""
    open_streams()
    end_cleanly()
    die_with_parent_after_fork()
    start_in_words()
    with for_doit():
        words = sys.argv[1:]
        variables = read_variables(
            doit_cmd._CMDLINE_VARS or {}, Path(loader.initial_workdir or "."), named_tasks(words)
        )
        if not variables.selection.runs:
            end_with_reader()
        _record(variables)
        began = time.time()
        hits = _unchanged(variables) if only_builds(words) else None
        if hits is not None:
            _console.hits = hits
            tasks = groups({})
        else:
            # Loading this takes as long as all the rest of a build with nothing to do.
            from mlcbuild.doit_face.run import open_run

            tasks = open_run(variables, _console, began)
        _console.at_end.append(lambda: _write_reports(variables))
    return (task for task in tasks)


def _unchanged(variables: Variables) -> list[Event] | None:
    """What there is to say where all that is selected is known to be up to date; None where it has to be looked at."""
    root = Path.cwd()
    memory = recall(root, variables.cache or root / "cache")
    found = memory.up_to_date(variables.selection) if memory else None
    if memory is None or found is None:
        return None
    names, missing = found
    if _console.records:
        cells = {name: memory.recipes[name] for name in (*names, *missing)}
        for event in planned(cells, lambda name: memory.tasks.get(name, ())):
            _console.record(event)
    steps = dict.fromkeys(step for name in names for step in memory.tasks[name])
    return [
        *(RecipeUnavailable(name, memory.unavailable[name]) for name in missing),
        *(StepFinished(step, step.partition(":")[0], "hit", 0.0, 0) for step in steps),
        *(PackageInstalled(name, f"dist/{name}", "hit", 0) for name in names),
    ]


def _record(variables: Variables) -> None:
    """Open what is to be written besides the screen."""
    if variables.log_json is not None:
        _console.log = json_log(variables.log_json)
    if variables.report is not None or variables.summary is not None:
        _console.collected = []
    _console.annotate = annotator(Path.cwd() / "dist", _console.reasons)


def _write_reports(variables: Variables) -> None:
    """The pages of this run. Raises MlcBuildError where one cannot be written."""
    if not _console.collected:
        return
    from mlcbuild.reporting.history import read_logs, runs_of
    from mlcbuild.reporting.summary import markdown
    from mlcbuild.workspace.reports import write_page, write_report

    runs = runs_of(_console.collected)
    if variables.report is not None:  # a log that other runs are in too gives the page its trends
        write_report(variables.report, read_logs([variables.log_json]) if variables.log_json else runs)
    if variables.summary is not None:
        write_page(variables.summary, markdown(runs))
