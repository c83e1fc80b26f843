"""The `mlcbuild` command: it parses, calls and prints. Building is doit's: `doit build recipe=NAME`.

Exit status: 0 fine, 1 problems were found, 2 the command line is wrong; that of `mlcbuild build` is doit's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from mlcbuild import __version__
from mlcbuild.cli import cache, models, talk, workspace
from mlcbuild.cli.options import add, command
from mlcbuild.cli.watch import watch
from mlcbuild.errors import in_words
from mlcbuild.streams import open_streams, refused

_DESCRIPTION = "Declarative builds of compiled language models. Building itself is doit's: doit build recipe=NAME"

_WATCHED = ("inspect", "new")  # what reads checkpoints in this process and not in a step's
_RUNNING = ("generate", "chat", "serve")  # what runs packages; `evaluate` does so with lm-eval, which wants torch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the status that the process should exit with."""
    words = sys.argv[1:] if arguments is None else [*arguments]
    if arguments is None:
        open_streams()
    if words[:1] == ["build"]:
        return _build(words)
    name, run = _command(words)
    if arguments is None and name in _RUNNING:
        from mlcbuild.engine.child import without_torch

        without_torch()
    if arguments is None and name in _WATCHED:
        from mlcbuild.engine.watched import watched

        run = partial(watched, partial(_ended, name, run))
    return _ended(name, run)


def _ended(name: str, run: Callable[[], int]) -> int:
    """The status of a command, after whatever is to be said of its end."""
    try:
        status = run()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has seen enough: `mlcbuild plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Exception as error:
        text = refused(error) or in_words(error)
        if text is None:
            raise
        print(f"mlcbuild {name}: {text}", file=sys.stderr)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            return 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        return 1


def _command(words: Sequence[str]) -> tuple[str, Callable[[], int]]:
    """The command's name, and what runs it."""
    if words[:1] == ["watch"] and not {"-h", "--help"} & {*words[1:2]}:
        return "watch", partial(watch, words[1:])
    options = _parser().parse_args(words)
    return options.command, partial(options.run, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mlcbuild", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"mlcbuild {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add(commands, workspace.COMMANDS)
    add(commands, [command("build", lambda options: 0, "the same as `doit build`, with the same words after it")])
    again = "build, and again whenever a file of recipes/ changes; words after it are those of `doit build`"
    add(commands, [command("watch", lambda options: 0, again)])
    add(commands, models.COMMANDS)
    add(commands, talk.COMMANDS)
    cache.add_commands(commands)
    return parser


def _build(words: list[str]) -> int:
    """`doit build …` in this process: the workspace's dodo.py is in the working directory, as for doit."""
    from doit.doit_cmd import DoitMain

    sys.argv = ["doit", *words]  # where our tasks read what doit was asked for
    status: int = DoitMain().run(words)
    return status
