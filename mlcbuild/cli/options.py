"""What several commands take, and what they make of it: the workspace, its cache, a selection of recipes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlcbuild.recipes.select import Selection
    from mlcbuild.workspace.session import Session

Argument = tuple[tuple[str, ...], dict[str, Any]]
Command = tuple[str, Callable[[argparse.Namespace], int], str, tuple[Argument, ...]]


def arg(*names: str, **settings: Any) -> Argument:
    """An argument of a command, as argparse takes it."""
    return names, settings


def command(name: str, run: Callable[[argparse.Namespace], int], does: str, *arguments: Argument) -> Command:
    """A command: what it is called, the function that is it and gives the exit status, what it does, what it takes."""
    return name, run, does, arguments


def add(parsers: Any, commands: Iterable[Command]) -> None:
    """Add a parser for each command to `parsers` (of argparse)."""
    for name, run, does, arguments in commands:
        parser = parsers.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        parser.set_defaults(run=run)
        for names, settings in arguments:
            parser.add_argument(*names, **settings)


CACHE = arg("--cache", type=Path, help="the cache folder (default: MLCBUILD_CACHE, or the workspace's cache/)")
JSON = arg("--json", action="store_true", help="print JSON")
RECIPES = arg("recipe", metavar="NAME", help="recipe names and globs, with commas")
SAMPLING = (
    arg("--temperature", type=float, metavar="T", help="0 takes the likeliest token each time"),
    arg("--top-p", type=float, metavar="P", help="sample from the likeliest tokens that reach probability P (1: all)"),
    arg("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (0: all)"),
    arg("--min-p", type=float, metavar="P", help="leave out what is less than P times as likely as the likeliest"),
    arg("--repetition-penalty", type=float, metavar="R", help="weaken tokens of prompt and text (1: do not)"),
    arg("--presence-penalty", type=float, metavar="A", help="taken from the logits of tokens in the text"),
    arg("--frequency-penalty", type=float, metavar="A", help="the same, for each time that a token occurs in it"),
    arg("--seed", type=int, help="seed of the sampling: the same seed gives the same text"),
)
STOP = arg("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")


def given(options: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """What the command line gives, by name, for a function whose defaults apply to the rest."""
    values = vars(options).items()
    return {name: value for name, value in values if value is not None and name not in ("command", "run", *left_out)}


def workspace() -> Path:
    """The folder of the workspace that the working directory is in. Raises MlcBuildError where it is in none."""
    from mlcbuild.recipes.files import find_root

    return find_root(Path.cwd())


def named_cache(options: argparse.Namespace) -> Path | None:
    """The cache folder that the command line or the environment names."""
    named = getattr(options, "cache", None) or os.environ.get("MLCBUILD_CACHE")
    return Path(named).absolute() if named else None


def cache_of(options: argparse.Namespace, root: Path) -> Path:
    """The cache folder: the named one, or the workspace's own."""
    return named_cache(options) or root / "cache"


def session_of(options: argparse.Namespace, selection: Selection | None = None, **settings: Any) -> Session:
    """The workspace with the recipes of a selection, or those called `recipe`; without a word about what is
    unavailable. `settings` are those of workspace.session. Raises MlcBuildError."""
    from mlcbuild.recipes.select import Selection
    from mlcbuild.workspace.session import Settings, open_session

    settings = {"cache": named_cache(options), **settings}
    return open_session(workspace(), lambda _: None, selection or Selection(options.recipe), Settings(**settings))
