"""The commands that look ahead and back: `plan`, `matrix` and `report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlcbuild.errors import MlcBuildError

if TYPE_CHECKING:
    from mlcbuild.workspace.session import Session

Run = Callable[[argparse.Namespace], int]
Add = Callable[["argparse._SubParsersAction[argparse.ArgumentParser]", str, Run, str], argparse.ArgumentParser]

_AXES = ("model", "quantization", "target")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser], add: Add) -> None:
    """Put the commands among the others."""
    plan = add(commands, "plan", _plan, "show what a build would do: steps, what is cached, bytes and time")
    matrix = add(commands, "matrix", _matrix, "show which recipes share which libraries and weights")
    for command in (plan, matrix):
        command.add_argument(
            "words",
            nargs="*",
            metavar="NAME",
            help="recipe names and globs, or model=…, quantization=…, target=…, changed=REV",
        )
        for axis in _AXES:
            command.add_argument(
                f"--{axis}", metavar="NAME", help=f"only recipes with such a {axis}: names and globs, with commas"
            )
        command.add_argument("--changed", metavar="REV", help="only recipes whose files differ from this git revision")
        command.add_argument(
            "--cache", type=Path, help="the cache folder (default: MLCBUILD_CACHE, or the workspace's cache/)"
        )
    matrix.add_argument("--json", action="store_true", help="as JSON")
    matrix.add_argument("--emit", choices=["github"], help="the unique steps, as matrices of a CI system's jobs")

    report = add(commands, "report", _report, "make an HTML page or a Markdown summary of builds' JSON logs")
    report.add_argument(
        "logs", nargs="+", type=Path, metavar="LOG.jsonl", help="what log_json= wrote, the oldest first"
    )
    report.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="FILE.html or FILE.md (default: Markdown to the screen)"
    )


def _plan(options: argparse.Namespace) -> int:
    from mlcbuild.workspace.estimate import check_room, preview, render

    session = _session(options)
    plan = preview(session)
    sys.stdout.write(render(plan))
    sys.stdout.flush()
    check_room(plan, session.store.root)
    return 0


def _matrix(options: argparse.Namespace) -> int:
    from mlcbuild.workspace.matrix import matrix, render, to_github, to_json

    found = matrix(_session(options, everything=options.emit is None))
    sys.stdout.write(to_github(found) if options.emit else to_json(found) if options.json else render(found))
    return 1 if found.broken else 0


def _session(options: argparse.Namespace, everything: bool = False) -> Session:
    """The selected recipes; without a selection those of a bare `doit build`, or with `everything` the manual ones too.

    Raises MlcBuildError.
    """
    from mlcbuild.recipes.workspace import find_root
    from mlcbuild.workspace.scope import Scope
    from mlcbuild.workspace.session import open_session
    from mlcbuild.workspace.variables import read_variables

    given = _given(options)
    variables = read_variables(given, Path.cwd())
    for name in given.keys() - {"recipe", *_AXES, "changed", "cache"}:
        raise MlcBuildError(f"{name}= is for building; a plan takes {', '.join(_AXES)}, changed and cache")
    cache = options.cache.absolute() if options.cache else variables.cache
    scope = Scope() if everything else None
    root = find_root(Path.cwd())
    return open_session(root, lambda _: None, variables.wanted, cache, scope=scope, keep_going=everything)


def _given(options: argparse.Namespace) -> dict[str, str]:
    """The words and options as doit's `name=value`; the last of a kind counts, as with doit."""
    given: dict[str, str] = {}
    names = []
    for word in options.words:
        name, equals, value = word.partition("=")
        if equals:
            given[name] = value
        else:
            names.append(word)
    if names:
        given["recipe"] = ",".join(names)
    given |= {name: value for name in (*_AXES, "changed") if (value := getattr(options, name)) is not None}
    return given


def _report(options: argparse.Namespace) -> int:
    from mlcbuild.reporting.history import read_logs
    from mlcbuild.reporting.summary import markdown
    from mlcbuild.workspace.pages import write_report

    runs = read_logs(options.logs)
    if options.output is None:
        sys.stdout.write(markdown(runs))
    else:
        write_report(options.output, runs)
    return 0
