"""The `mlcbuild` command: it parses, calls and prints. Building is doit's: `doit build recipe=NAME`.

Exit status: 0 fine, 1 problems were found, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mlcbuild import __version__
from mlcbuild.cli import models as cli_models
from mlcbuild.cli import reports as cli_report
from mlcbuild.cli.cache import add_commands
from mlcbuild.errors import MlcBuildError

_CACHE_HELP = "the cache folder (default: MLCBUILD_CACHE, or the workspace's cache/)"
_DESCRIPTION = "Declarative builds of compiled language models. Building itself is doit's: doit build recipe=NAME"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the status that the process should exit with."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except MlcBuildError as error:
        print(f"mlcbuild {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mlcbuild", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"mlcbuild {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    check = _add(commands, "check", _check, "say everything that is wrong with the workspace's YAML files")
    check.add_argument("folder", nargs="?", type=Path, default=Path(), help="a folder in the workspace (default: here)")

    doctor = _add(commands, "doctor", _doctor, "say which targets this machine can build for, and what the others need")
    doctor.add_argument("--json", action="store_true", help="print the answer as JSON")
    doctor.add_argument("--cache", type=Path, help=_CACHE_HELP)

    init = _add(commands, "init", _init, "make a new workspace")
    init.add_argument("folder", type=Path, metavar="DIR")

    why = _add(commands, "why", _why, "say for each step of a recipe whether it would run, and what changed if so")
    why.add_argument("recipe", metavar="NAME", help="recipe names and globs, with commas")
    why.add_argument("--cache", type=Path, help=_CACHE_HELP)

    test_run = _add(commands, "test-run", _test_run, "try every step of a recipe on a small random model")
    test_run.add_argument("recipe", metavar="NAME", help="recipe names and globs, with commas")
    test_run.add_argument("--cache", type=Path, help=_CACHE_HELP)

    cli_models.add_commands(commands, _add)
    add_commands(commands, _add)
    cli_report.add_commands(commands, _add)

    lock = _add(commands, "lock", _lock, "pin the hub repositories of models in recipes/recipes.lock")
    lock.add_argument("models", nargs="*", metavar="MODEL", help="names and globs (default: every recipe's model)")
    lock.add_argument("--update", action="store_true", help="move locked ones to where their branch is now")
    lock.add_argument("--cache", type=Path, help=_CACHE_HELP)

    generate = _add(commands, "generate", _generate, "run a package: print what it writes after a prompt")
    generate.add_argument("folder", type=Path, help="a package (dist/NAME), or a folder of weights with --library")
    generate.add_argument("--prompt", required=True, help="the text to go on from, or with --chat the user's message")
    generate.add_argument("--chat", action="store_true", help="apply the package's conversation template")
    generate.add_argument("--library", type=Path, help="the compiled library, where it is not in the folder")
    generate.add_argument("--max-tokens", type=int, default=256, metavar="N", help="stop after N tokens (default 256)")
    generate.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest token each time"
    )
    generate.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest P (default 1)"
    )
    generate.add_argument("--seed", type=int, help="of the sampling, for the same text again")
    generate.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: physical cores)")

    compare = _add(commands, "compare", _compare, "print two packages' figures side by side")
    compare.add_argument("one", type=Path, metavar="A", help="a package (dist/NAME)")
    compare.add_argument("other", type=Path, metavar="B", help="another package")
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    help_text: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _check(options: argparse.Namespace) -> int:
    from mlcbuild.recipes.check import check, render
    from mlcbuild.recipes.workspace import find_root

    report = check(find_root(options.folder.absolute()))
    sys.stdout.write(render(report))
    return 0 if report.ok else 1


def _doctor(options: argparse.Namespace) -> int:
    import json

    from mlcbuild.recipes.load import load
    from mlcbuild.recipes.workspace import find_root
    from mlcbuild.workspace.doctor import diagnose, render

    root = find_root(Path.cwd())
    found = diagnose(load(root).targets.values(), _cache(options) or root / "cache")
    print(json.dumps(found.to_json(), indent=2) if options.json else render(found), end="\n" if options.json else "")
    return 0 if found.ok else 1


def _init(options: argparse.Namespace) -> int:
    from mlcbuild.recipes.init import init

    for path in init(options.folder):
        print(path)
    print(f"Next: cd {options.folder} && doit build")
    return 0


def _why(options: argparse.Namespace) -> int:
    from mlcbuild.engine.why import why
    from mlcbuild.recipes.workspace import find_root
    from mlcbuild.workspace.session import open_session

    session = open_session(find_root(Path.cwd()), lambda _: None, options.recipe, _cache(options))
    for name, goal in session.graph.goals.items():
        if len(session.graph.goals) > 1:
            print(f"{name}:")
        for answer in why(session.lookup, goal.steps.values()):
            print(answer)
        installed = session.is_installed(name)
        print(f"{'hit ' if installed else 'miss'}  dist/{name}")
    for name, text in session.graph.unlocked.items():
        print(f"??    {name}: unknown until locked: {text}")
    return 0


def _test_run(options: argparse.Namespace) -> int:
    from mlcbuild.recipes.workspace import find_root
    from mlcbuild.reporting.screen import screen
    from mlcbuild.smoke.run import test_run

    for text in test_run(find_root(Path.cwd()), options.recipe, _cache(options), screen(sys.stdout)).values():
        print(text)
    return 0


def _lock(options: argparse.Namespace) -> int:
    from mlcbuild.recipes.load import load
    from mlcbuild.recipes.workspace import find_root
    from mlcbuild.workspace.lock_models import pin

    root = find_root(Path.cwd())
    pin(load(root), _cache(options) or root / "cache", options.models, options.update)
    return 0


def _cache(options: argparse.Namespace) -> Path | None:
    named = options.cache or (Path(os.environ["MLCBUILD_CACHE"]) if os.environ.get("MLCBUILD_CACHE") else None)
    return named.absolute() if named else None


def _compare(options: argparse.Namespace) -> int:
    from mlcbuild.reporting.compare import compare

    sys.stdout.write(compare(options.one, options.other))
    return 0


def _generate(options: argparse.Namespace) -> int:
    from mlcbuild.runtime.commands import generate

    generate(
        options.folder,
        options.prompt,
        chat=options.chat,
        library=options.library,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        threads=options.threads,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
