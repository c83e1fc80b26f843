"""Linkers by kind: object files in, one library out."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from mlcbuild.recipes.types import Linker
from mlcbuild.zig import run_zig


def zig_compile(
    source: Path, output: Path, target: str, cpu: str, cache: Path, defines: Sequence[tuple[str, str | int]] = ()
) -> str:
    """Compile one C file for a zig target triple and CPU; the command. Raises MlcBuildError with zig's message."""
    flags = ["-O3", "-fPIC", "-fno-math-errno", "-fno-sanitize=all", "-Wall", "-Wextra", "-Werror", "-g0"]
    flags += [f"-D{name}={value}" for name, value in defines]
    return _run(["cc", "-target", target, f"-mcpu={cpu}", *flags, "-c", str(source), "-o", str(output)], cache)


def zig_link(objects: Sequence[Path], output: Path, triple: str, linker: Linker, scratch: Path) -> str:
    """Link object files into a library; the command. Raises MlcBuildError with the linker's message.

    What the library `needs` is declared by linking against empty libraries of those names: zig would otherwise build
    the system's C library first, which takes longer than everything else together.
    """
    stubs = [_stub(name, triple, scratch) for name in linker.needs]
    flags = [*linker.flags, *(["-Wl,--no-as-needed"] if stubs else [])]
    return _run(["cc", "-target", triple, *flags, "-o", str(output), *map(str, [*objects, *stubs])], scratch / "zig")


def _run(arguments: Sequence[str], cache: Path) -> str:
    """Run zig; what a person would type to run it again."""
    run_zig(arguments, cache)
    return shlex.join(["python", "-m", "ziglang", *arguments])


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
