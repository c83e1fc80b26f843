"""Linkers by kind: object files in, one library out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.types import Linker

ZIG = (sys.executable, "-m", "ziglang")


def zig_compile(source: Path, output: Path, target: str, cpu: str, cache: Path) -> None:
    """Compile one C file for a zig target triple and CPU. Raises MlcBuildError with the compiler's message."""
    flags = ["-O3", "-fPIC", "-fno-math-errno", "-fno-sanitize=all", "-Wall", "-Wextra", "-Werror", "-g0"]
    run_zig(["cc", "-target", target, f"-mcpu={cpu}", *flags, "-c", str(source), "-o", str(output)], cache)


def zig_link(objects: Sequence[Path], output: Path, triple: str, linker: Linker, scratch: Path) -> None:
    """Link object files into a library. Raises MlcBuildError with the linker's message.

    What the library `needs` is declared by linking against empty libraries of those names: zig would otherwise build
    the system's C library first, which takes longer than everything else together.
    """
    stubs = [_stub(name, triple, scratch) for name in linker.needs]
    flags = [*linker.flags, *(["-Wl,--no-as-needed"] if stubs else [])]
    run_zig(["cc", "-target", triple, *flags, "-o", str(output), *map(str, [*objects, *stubs])], scratch / "zig")


def _stub(name: str, triple: str, scratch: Path) -> Path:
    """An empty shared library with this soname."""
    folder = scratch / "needs"
    folder.mkdir(exist_ok=True)
    source = folder / "empty.c"
    source.write_text("")
    output = folder / name
    flags = ["-shared", "-nostdlib", f"-Wl,-soname,{name}", "-o", str(output)]
    run_zig(["cc", "-target", triple, *flags, str(source)], scratch / "zig")
    return output


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
