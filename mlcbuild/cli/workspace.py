"""The commands about a workspace: made, checked and locked; what a build would do, and what builds have done."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mlcbuild.cli.options import CACHE, JSON, RECIPES, arg, cache_of, command, session_of, workspace
from mlcbuild.errors import MlcBuildError

if TYPE_CHECKING:
    from mlcbuild.workspace.session import Session

_AXES = ("model", "quantization", "target")


def _init(options: argparse.Namespace) -> int:
    from mlcbuild.workspace.init import init

    for path in init(options.folder):
        print(path)
    print(f"Next: cd {options.folder} && doit build")
    return 0


def _check(options: argparse.Namespace) -> int:
    from mlcbuild.recipes.files import find_root
    from mlcbuild.recipes.load import check, render

    report = check(find_root(options.folder.absolute()))
    sys.stdout.write(render(report))
    return 0 if report.ok else 1


def _lock(options: argparse.Namespace) -> int:
    from mlcbuild.recipes.load import load
    from mlcbuild.workspace.hub_locks import lock_models

    root = workspace()
    lock_models(load(root), cache_of(options, root), options.models, options.update)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from mlcbuild.recipes.load import load
    from mlcbuild.workspace.doctor import diagnose, remedy, render

    root = workspace()
    found = diagnose(load(root).targets.values(), cache_of(options, root))
    if options.fix:
        command, helpless = remedy(found)
        print(command or "# nothing that can be installed is missing")
        for name in helpless:
            print(f"mlcbuild doctor: {name}: {found.targets[name]}", file=sys.stderr)
        return 1 if helpless else 0
    sys.stdout.write(json.dumps(found.to_json(), indent=2) + "\n" if options.json else render(found))
    return 0 if found.ok else 1


def _why(options: argparse.Namespace) -> int:
    from mlcbuild.engine.why import why

    session = session_of(options)
    for name, goal in session.graph.goals.items():
        if len(session.graph.goals) > 1:
            print(f"{name}:")
        for answer in why(session.lookup, goal.steps.values()):
            print(answer)
        print(f"{'hit ' if session.is_installed(name) else 'miss'}  dist/{name}")
    for name, text in session.graph.unlocked.items():
        print(f"??    {name}: unknown until locked: {text}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from mlcbuild.workspace.estimate import check_room, estimate
    from mlcbuild.workspace.estimate_text import render

    session = _selected(options)
    coming = estimate(session)
    sys.stdout.write(render(coming))
    sys.stdout.flush()
    check_room(coming, session.store.root)
    return 0


def _matrix(options: argparse.Namespace) -> int:
    from mlcbuild.workspace.matrix import matrix, render, to_github, to_json

    found = matrix(_selected(options, everything=options.emit is None))
    sys.stdout.write(to_github(found) if options.emit else to_json(found) if options.json else render(found))
    return 1 if found.broken else 0


def _selected(options: argparse.Namespace, everything: bool = False) -> Session:
    """The selected recipes; without a selection those of a bare `doit build`, or with `everything` the manual ones too.

    Raises MlcBuildError.
    """
    from mlcbuild.doit_face.variables import read_variables
    from mlcbuild.recipes.select import Selection

    given = _given(options)
    variables = read_variables(given, Path.cwd(), Selection(whole=not everything))
    for name in given.keys() - {"recipe", *_AXES, "changed", "cache"}:
        raise MlcBuildError(f"{name}= is for building; a plan takes {', '.join(_AXES)}, changed and cache")
    options.cache = options.cache or variables.cache
    return session_of(options, variables.selection, keep_going=everything)


def _given(options: argparse.Namespace) -> dict[str, str]:
    """The words and options as doit's `name=value`; the last of a kind counts, as with doit."""
    given = dict(word.split("=", 1) for word in options.words if "=" in word)
    names = [word for word in options.words if "=" not in word]
    if names:
        given["recipe"] = ",".join(names)
    return given | {name: value for name in (*_AXES, "changed") if (value := getattr(options, name)) is not None}


def _report(options: argparse.Namespace) -> int:
    from mlcbuild.reporting.history import read_logs
    from mlcbuild.reporting.summary import markdown
    from mlcbuild.workspace.reports import write_report

    runs = read_logs(options.logs)
    if options.output is None:
        sys.stdout.write(markdown(runs))
    else:
        write_report(options.output, runs)
    return 0


_SELECTING = (
    arg(
        "words",
        nargs="*",
        metavar="NAME",
        help="recipe names and globs, or model=…, quantization=…, target=…, changed=REV",
    ),
    *(
        arg(f"--{axis}", metavar="NAME", help=f"only recipes with this {axis}: names and globs, with commas")
        for axis in _AXES
    ),
    arg("--changed", metavar="REV", help="only recipes whose files differ from this git revision"),
    CACHE,
)
COMMANDS = (
    command("init", _init, "make a new workspace", arg("folder", type=Path, metavar="DIR")),
    command(
        "check",
        _check,
        "report every problem in the workspace's YAML files",
        arg("folder", nargs="?", type=Path, default=Path(), help="a folder in the workspace (default: here)"),
    ),
    command(
        "lock",
        _lock,
        "write which commits of hub repositories are built to recipes/recipes.lock",
        arg("models", nargs="*", metavar="MODEL", help="names and globs (default: every recipe's model)"),
        arg("--update", action="store_true", help="also move locked models to the newest commit of their branch"),
        CACHE,
    ),
    command(
        "doctor",
        _doctor,
        "say which targets this machine can build for, and what the others need",
        arg("--fix", action="store_true", help="print one command that installs what the others need"),
        JSON,
        CACHE,
    ),
    command("plan", _plan, "show what a build would do: steps, what is cached, bytes and time", *_SELECTING),
    command(
        "matrix",
        _matrix,
        "show which recipes share which libraries and weights",
        *_SELECTING,
        JSON,
        arg("--emit", choices=["github"], help="print the steps, each once, as matrices of jobs for this CI system"),
    ),
    command("why", _why, "say for each step of a recipe whether it would run, and what has changed", RECIPES, CACHE),
    command(
        "report",
        _report,
        "make an HTML page or a Markdown summary of builds' JSON logs",
        arg("logs", nargs="+", type=Path, metavar="LOG.jsonl", help="files that log_json= wrote, the oldest first"),
        arg("-o", "--output", type=Path, metavar="FILE", help="FILE.html or FILE.md (default: Markdown to the screen)"),
    ),
)
