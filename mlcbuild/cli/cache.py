"""The commands that look after a cache folder: `gc`, `pin`, `unpin`, `cache verify`, `stats` and `push`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.cli.options import CACHE, RECIPES, add, arg, cache_of, command, named_cache, session_of, workspace
from mlcbuild.errors import MlcBuildError

if TYPE_CHECKING:
    from mlcbuild.cache.store import Store


def add_commands(parsers: Any) -> None:
    """Put the commands among the others; `cache` has commands of its own."""
    add(parsers, _COMMANDS)
    verbs = parsers.choices["cache"].add_subparsers(dest="verb", required=True, metavar="VERB")
    add(verbs, _VERBS)


def _gc(options: argparse.Namespace) -> int:
    from mlcbuild.workspace.maintenance import gc

    root, store = _place(options)
    text, reached = gc(store, root / "dist", options.max_size, options.dry_run)
    sys.stdout.write(text)
    return 0 if reached else 1


def _pin(options: argparse.Namespace) -> int:
    from mlcbuild.workspace.maintenance import pin_recipes

    for name in pin_recipes(session_of(options)):
        print(f"pinned {name}")
    return 0


def _unpin(options: argparse.Namespace) -> int:
    from mlcbuild.workspace.maintenance import unpin_recipes

    root, store = _place(options)
    for name in unpin_recipes(store, root, options.recipe):
        print(f"unpinned {name}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from mlcbuild.workspace.maintenance import verify

    _, store = _place(options)
    problems = verify(store)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else "every blob is what its name says")
    return 1 if problems else 0


def _stats(options: argparse.Namespace) -> int:
    from mlcbuild.workspace.maintenance import figures

    root, store = _place(options)
    sys.stdout.write(figures(store, root / "dist"))
    return 0


def _push(options: argparse.Namespace) -> int:
    from mlcbuild.doit_face.variables import read_patience, read_variables
    from mlcbuild.engine.shared import open_shared
    from mlcbuild.workspace.maintenance import push

    url = read_variables({"remote": options.remote} if options.remote is not None else {}, Path.cwd()).remote
    if url is None:
        raise MlcBuildError("which shared cache? Give --remote URL, or set MLCBUILD_REMOTE")
    put, had, problems = push(session_of(options, shared=open_shared(url, True, read_patience())))
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{put} put there, {had} were there already")
    return 1 if problems else 0


def _place(options: argparse.Namespace) -> tuple[Path, Store]:
    """The workspace (or the working directory, when a cache folder is named) and its cache. Raises MlcBuildError."""
    from mlcbuild.cache.store import Store

    try:
        root = workspace()
    except MlcBuildError:
        if named_cache(options) is None:
            raise
        root = Path.cwd()
    folder = cache_of(options, root)
    if not folder.is_dir():
        raise MlcBuildError(f"{folder}: no cache here: --cache DIR names another")
    try:
        return root, Store(folder)
    except OSError as error:
        raise MlcBuildError(f"{folder}: cannot be used as a cache: {error.strerror}") from None


_SIZE = arg("--max-size", required=True, metavar="SIZE", help="how large the cache may be, like 20G, 500M or 1.5TiB")
_DRY_RUN = arg("--dry-run", action="store_true", help="remove nothing, say what would go")
_REMOTE = arg("--remote", metavar="URL", help="the shared cache (default: MLCBUILD_REMOTE)")
_PUSH = "upload what recipes are built from to the shared cache"
_COMMANDS = (
    command("gc", _gc, "shrink the cache to a size: what was used least recently goes first", _SIZE, _DRY_RUN, CACHE),
    command("pin", _pin, "keep what recipes are built from now: gc does not remove it", RECIPES, CACHE),
    command("unpin", _unpin, "undo a pin: gc may remove it again", RECIPES, CACHE),
    command("cache", _stats, "check the cache, show what is in it, or upload from it"),
)
_VERBS = (
    command("verify", _verify, "read every file in the cache, and remove the damaged ones", CACHE),
    command("stats", _stats, "show sizes and counts by kind of step, hits, and what gc must keep", CACHE),
    command("push", _push, _PUSH, RECIPES, _REMOTE, CACHE),
)
