"""zig, the C compiler and linker that pip brings along: one way to run it, for whoever compiles or links."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mlcbuild.errors import MlcBuildError

ZIG = (sys.executable, "-m", "ziglang")


def run_zig(arguments: Sequence[str], cache: Path) -> None:
    """Run zig with its own cache in `cache`, so that nothing of the user's home is read or written."""
    environment = {
        **os.environ,
        "ZIG_LOCAL_CACHE_DIR": str(cache / "local"),
        "ZIG_GLOBAL_CACHE_DIR": str(cache / "global"),
    }
    done = subprocess.run([*ZIG, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MlcBuildError(
            f"zig {arguments[0]} failed ({done.returncode}):\n{done.stderr.strip() or done.stdout.strip()}"
        )
