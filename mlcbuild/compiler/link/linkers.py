"""zig as the C compiler and the linker of libraries: one object file of a C file, one library of object files."""

from __future__ import annotations

import shlex
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.types import Linker
from mlcbuild.zig import run_zig

# dlltool's names of what triples begin with.
_MACHINES = {"x86_64": "i386:x86-64", "aarch64": "arm64"}
# What code for Windows refers to wherever it holds floating point, and what runs when the DLL is loaded: nothing.
_WINDOWS = """int _fltused;
int DllMainCRTStartup(void *module, unsigned reason, void *unused) {
    return (void)module, (void)reason, (void)unused, 1;
}
int _DllMainCRTStartup(void *module, unsigned reason, void *unused) {
    return DllMainCRTStartup(module, reason, unused);
}
"""


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
    the system's C library first, which takes longer than everything else together. What it `imports` is declared by
    import libraries, since Windows wants to know which DLL a symbol is in.
    """
    stubs = [_stub(name, triple, scratch) for name in linker.needs]
    stubs += [_import_library(name, symbols, triple, scratch) for name, symbols in linker.imports.items()]
    if "-windows-" in triple:
        stubs.append(_write(scratch / "needs" / "windows.c", _WINDOWS))
    flags = [*linker.flags, *(["-Wl,--no-as-needed"] if linker.needs else [])]
    if "-macos" in triple:  # it would be the place where it was linked
        flags.append(f"-Wl,-install_name,@rpath/{output.name}")
    linked = scratch / "linked" / output.name  # a folder of its own: linkers for Windows leave more than the library
    linked.parent.mkdir(exist_ok=True)
    command = _run(["cc", "-target", triple, *flags, "-o", str(linked), *map(str, [*objects, *stubs])], scratch / "zig")
    if "-windows-" in triple:
        _undate(linked)
    shutil.move(linked, output)
    return command


def _undate(path: Path) -> None:
    """Take the time of linking out of a PE file's header, for the same bytes tomorrow."""
    with path.open("r+b") as file:
        header = struct.unpack("<I", file.read(64)[60:])[0]
        file.seek(header + 8)
        file.write(bytes(4))


def _run(arguments: Sequence[str], cache: Path) -> str:
    """Run zig; what a person would type to run it again."""
    run_zig(arguments, cache)
    return shlex.join(["python", "-m", "ziglang", *arguments])


def _stub(name: str, triple: str, scratch: Path) -> Path:
    """An empty shared library with this soname.

    Its file's name ends in .so: zig knows one with a version behind that only where no folder on its path has `.so.`
    in its name.
    """
    source = _write(scratch / "needs" / "empty.c", "")
    output = source.parent / f"{name.partition('.so')[0]}.so"
    flags = ["-shared", "-nostdlib", f"-Wl,-soname,{name}", "-o", str(output)]
    run_zig(["cc", "-target", triple, *flags, str(source)], scratch / "zig")
    return output


def _import_library(name: str, symbols: Sequence[str], triple: str, scratch: Path) -> Path:
    """What says that `symbols` are in the DLL `name`."""
    definition = _write(scratch / "needs" / f"{name}.def", "\n".join([f'LIBRARY "{name}"', "EXPORTS", *symbols, ""]))
    output = definition.with_suffix(".lib")
    machine = _MACHINES.get(triple.split("-")[0])
    if machine is None:
        raise MlcBuildError(f"linker target {triple}: imports are known for {', '.join(_MACHINES)} only")
    run_zig(["dlltool", "-m", machine, "-d", str(definition), "-l", str(output)], scratch / "zig")
    return output


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path
