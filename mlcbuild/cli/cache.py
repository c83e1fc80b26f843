"""The commands that look after a cache folder: `gc`, `pin`, `unpin`, `cache verify`, `stats` and `push`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlcbuild.cache.store import Store

Run = Callable[[argparse.Namespace], int]
Add = Callable[["argparse._SubParsersAction[argparse.ArgumentParser]", str, Run, str], argparse.ArgumentParser]

_CACHE_HELP = "the cache folder (default: MLCBUILD_CACHE, or the workspace's cache/)"
_NAMES_HELP = "recipe names and globs, with commas"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser], add: Add) -> None:
    """Put the commands among the others."""
    gc = add(commands, "gc", _gc, "remove what was used least recently from the cache, down to a size")
    gc.add_argument("--max-size", required=True, metavar="SIZE", help="what may stay, like 20G, 500M or 1.5TiB")
    gc.add_argument("--dry-run", action="store_true", help="only say what would go")

    pin = add(commands, "pin", _pin, "keep what recipes are built from, as it is now, out of gc's reach")
    pin.add_argument("recipe", metavar="NAME", help=_NAMES_HELP)

    unpin = add(commands, "unpin", _unpin, "let gc have again what was pinned")
    unpin.add_argument("recipe", metavar="NAME", help=_NAMES_HELP)

    cache = add(commands, "cache", _stats, "check the cache, or say what is in it")
    verbs = cache.add_subparsers(dest="verb", required=True, metavar="VERB")
    verify = add(verbs, "verify", _verify, "read every blob, and remove those that are not what their name says")
    figures = add(verbs, "stats", _stats, "sizes and counts by kind of step, hits, and what is held")
    push = add(verbs, "push", _push, "put what recipes are built from into the shared cache, where it is not there")
    push.add_argument("recipe", metavar="NAME", help=_NAMES_HELP)
    push.add_argument("--remote", metavar="URL", help="the shared cache (default: MLCBUILD_REMOTE)")
    for parser in (push, gc, pin, unpin, verify, figures):
        parser.add_argument("--cache", type=Path, help=_CACHE_HELP)


def _gc(options: argparse.Namespace) -> int:
    from mlcbuild.workspace.maintenance import gc

    root, store = _place(options)
    text, reached = gc(store, root / "dist", options.max_size, options.dry_run)
    sys.stdout.write(text)
    return 0 if reached else 1


def _pin(options: argparse.Namespace) -> int:
    from mlcbuild.recipes.workspace import find_root
    from mlcbuild.workspace.maintenance import pin_recipes
    from mlcbuild.workspace.session import open_session

    session = open_session(find_root(Path.cwd()), lambda _: None, options.recipe, _folder(options))
    for name in pin_recipes(session):
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
    from mlcbuild.engine.shared import open_shared
    from mlcbuild.errors import MlcBuildError
    from mlcbuild.recipes.workspace import find_root
    from mlcbuild.workspace.maintenance import push
    from mlcbuild.workspace.session import open_session
    from mlcbuild.workspace.variables import read_patience, read_remote

    url, _ = read_remote(options.remote, Path.cwd())
    if url is None:
        raise MlcBuildError("which shared cache? Give --remote URL, or set MLCBUILD_REMOTE")
    shared = open_shared(url, True, read_patience())
    root = find_root(Path.cwd())
    session = open_session(root, lambda _: None, options.recipe, _folder(options), shared=shared)
    put, had, problems = push(session)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{put} put there, {had} were there already")
    return 1 if problems else 0


def _place(options: argparse.Namespace) -> tuple[Path, Store]:
    """The workspace (or the working directory, when a cache folder is named) and its cache. Raises MlcBuildError."""
    from mlcbuild.cache.store import Store
    from mlcbuild.errors import MlcBuildError
    from mlcbuild.recipes.workspace import find_root

    named = _folder(options)
    try:
        root = find_root(Path.cwd())
    except MlcBuildError:
        if named is None:
            raise
        root = Path.cwd()
    folder = named or root / "cache"
    if not folder.is_dir():
        raise MlcBuildError(f"{folder}: no cache here: --cache DIR names another")
    try:
        return root, Store(folder)
    except OSError as error:
        raise MlcBuildError(f"{folder}: cannot be used as a cache: {error.strerror}") from None


def _folder(options: argparse.Namespace) -> Path | None:
    named = options.cache or (Path(os.environ["MLCBUILD_CACHE"]) if os.environ.get("MLCBUILD_CACHE") else None)
    return named.absolute() if named else None
