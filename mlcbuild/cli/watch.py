"""`mlcbuild watch …`: `doit build …`, and once more whenever a file of recipes/ has changed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.files import find_root
from mlcbuild.recipes.lockfile import lock_path

_EVERY = 500  # milliseconds between looks


def watch(words: Sequence[str]) -> int:
    """Build, wait for a change, build again, until Ctrl-C or SIGTERM, which end a build, too.

    What is up to date is not built again, as always. Each build is a process of its own: a mistake in a file, or a
    build that fails, ends only that one. Changes during a build are seen after it. Raises MlcBuildError outside of a
    workspace, and without the package watchfiles.
    """
    try:
        import watchfiles
    except ModuleNotFoundError:
        raise MlcBuildError("watchfiles is not installed: pip install 'mlcbuild[watch]'") from None
    root = find_root(Path.cwd())
    told: list[int] = []  # watchfiles makes a KeyboardInterrupt of whatever ends it

    def end(number: int, _: object) -> None:
        told.append(number)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    changes = watchfiles.watch(
        root / "recipes",
        watch_filter=lambda _, name: Path(name) != lock_path(root),  # a build may write it
        rust_timeout=_EVERY,
        yield_on_timeout=True,
    )
    try:
        next(changes)  # from here on nothing is missed
        while True:
            _build(words, root)
            _say("waiting for changes in recipes/; Ctrl-C ends")
            changed = next(found for found in changes if found)
            _say(f"changed: {', '.join(sorted(Path(name).relative_to(root).as_posix() for _, name in changed))}")
    except (KeyboardInterrupt, SystemExit):
        return 128 + (told[0] if told else signal.SIGINT)


def _build(words: Sequence[str], root: Path) -> None:
    with subprocess.Popen([sys.executable, "-m", "doit", "build", *words], cwd=root) as process:
        try:
            process.wait()
        except KeyboardInterrupt:  # a terminal tells the build, too, which ends its steps
            process.wait()
            raise
        except SystemExit:  # `kill` tells this process alone
            process.terminate()
            process.wait()
            raise


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
