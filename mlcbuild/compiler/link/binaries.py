"""Is a library what its target says? Its format, its processor, how runtimes open it, no paths of here."""

from __future__ import annotations

import os
import sysconfig
import tarfile
from collections.abc import Sequence
from pathlib import Path

from mlcbuild.compiler.link import symbols
from mlcbuild.errors import MlcBuildError

ENTRY = "__tvm_ffi__library_bin"  # where tvm_ffi.load_module finds the module's functions; static ones have a prefix
_PACKAGE = Path(__file__).parents[2]

# What TVM's JavaScript calls in a module, and what it defines for one (web-llm, class Environment). emcc lets any other
# name be undefined, which no browser would.
_WASM_EXPORTS = {"memory", "_initialize", "TVMWasmAllocSpace", "TVMWasmFreeSpace"}
_WASM_EXPORTS |= {f"TVMFFI{name}" for name in ("FunctionGetGlobal", "FunctionCall", "ObjectDecRef")}
_WASM_IMPORTS = {"TVMFFIWasmSafeCall", "TVMFFIWasmFunctionDeleter", "__console_log", "__cxa_thread_atexit"}
_WASM_IMPORTS |= {"emscripten_notify_memory_growth"}


def check(path: Path, triple: str, hidden: Sequence[Path] = (), prefix: str = "") -> None:
    """Raises MlcBuildError where the library at `path` is not for `triple`, cannot be opened, or names a path.

    `triple` is zig's or LLVM's. `hidden` are folders whose names must not be in it, besides this machine's home and
    installed packages. `prefix` is that of a static library's symbols.
    """
    system = _system(triple)
    machine = triple.partition("-")[0].replace("arm64", "aarch64")
    exported: set[str] = set()
    for name, data in _parts(path).items():
        try:
            binary = symbols.read(data, system)
        except ValueError as error:
            raise MlcBuildError(f"{name}: the linker made no library for {triple}: {error}") from None
        if binary.machine != machine:
            raise MlcBuildError(f"{name}: the linker made code for {binary.machine}, the target says {machine}")
        exported |= binary.exported
        unknown = sorted({n.removeprefix("env.") for n in binary.imported if n.startswith("env.")} - _WASM_IMPORTS)
        if unknown:
            raise MlcBuildError(f"{name}: wants {', '.join(unknown)}, which no browser's runtime has")
        named = sorted(place for place in _places(hidden) if place.encode() in data)
        if named:
            raise MlcBuildError(f"{name}: names {', '.join(named)}, so it would differ on another machine")
    missing = sorted((_WASM_EXPORTS if system == "wasm" else {prefix + ENTRY}) - exported)
    if missing:
        raise MlcBuildError(f"{path.name}: exports no {', '.join(missing)}, so no runtime could open it")


def _system(triple: str) -> str:
    if triple.startswith("wasm32"):
        return "wasm"
    if "windows" in triple:
        return "windows"
    return "macos" if any(word in triple for word in ("-apple-", "-macos", "-ios")) else "linux"


def _parts(path: Path) -> dict[str, bytes]:
    """The file, or a tar's members."""
    if path.suffix != ".tar":
        return {path.name: path.read_bytes()}
    with tarfile.open(path) as archive:
        return {
            f"{path.name}: {member.name}": archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
        }


def _places(hidden: Sequence[Path]) -> set[str]:
    home = str(Path.home())
    return {*map(str, (*hidden, _PACKAGE)), sysconfig.get_path("purelib"), home.rstrip(os.sep) + os.sep} - {os.sep}
