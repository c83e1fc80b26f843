"""zig, the C compiler and linker that pip brings along: one way to run it, for whoever compiles or links."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mlcbuild.errors import MlcBuildError

ZIG = (sys.executable, "-m", "ziglang")
SHARED = "MLCBUILD_ZIG_CACHE"  # the folder of zig's cache that several steps have in common


def run_zig(arguments: Sequence[str], cache: Path) -> None:
    """Run zig with a cache that steps share, or else with its own in `cache`: the user's home is not touched.

    zig finds an object by the content of sources, headers and flags: libraries of one format have the same kernels.
    Raises MlcBuildError with zig's own message.
    """
    shared = os.environ.get(SHARED)
    done = _run(arguments, Path(shared) if shared else cache)
    if done.returncode and shared:  # if it is not the source that is broken, the cache is
        done = _run(arguments, cache)
        if done.returncode == 0:
            shutil.rmtree(shared, ignore_errors=True)
    if done.returncode:
        raise MlcBuildError(
            f"zig {arguments[0]} failed ({done.returncode}):\n{done.stderr.strip() or done.stdout.strip()}"
        )


def _run(arguments: Sequence[str], cache: Path) -> subprocess.CompletedProcess[str]:
    places = {f"ZIG_{name.upper()}_CACHE_DIR": str(cache / name) for name in ("local", "global")}
    return subprocess.run([*ZIG, *arguments], env={**os.environ, **places}, capture_output=True, text=True, check=False)
