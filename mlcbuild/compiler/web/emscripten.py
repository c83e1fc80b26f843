"""emscripten compiles TVM's runtime for browsers and links models to it.

The runtime's sources come with apache-tvm's wheel, all but a few headers, for which headers/ has replacements; or they
come from a TVM source tree that TVM_SOURCE_DIR names. Sources are copied to one tree first, because they include each
other by relative paths, and because the tree's place is then in no object file.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlcbuild.errors import MlcBuildError, Unavailable

ADVICE = "install emscripten (Debian: `apt-get install emscripten`; elsewhere: emsdk) and put emcc on the search path"
SOURCE_DIR = "TVM_SOURCE_DIR"

_HEADERS = Path(__file__).parent / "headers"
_UNITS = ("tvmjs_support", "webgpu_runtime", "wasm_runtime")
_INCLUDE = ("include", "3rdparty/tvm-ffi/include", "3rdparty/tvm-ffi/3rdparty/dlpack/include", "3rdparty/compiler-rt")
_COMPILE = ("-O2", "-std=c++17", "-g0", "-Wno-everything")
# What tvm/support/emcc.py passes. Whether JavaScript defines what is left undefined, link/binaries.py checks.
_LINK = (
    *("-O2", "--no-entry"),
    *("-s", "WASM_BIGINT=1"),
    *("-s", "ERROR_ON_UNDEFINED_SYMBOLS=0"),
    *("-s", "STANDALONE_WASM=1"),
    *("-s", "ALLOW_MEMORY_GROWTH=1"),
    *("-s", "TOTAL_MEMORY=160MB"),
)


def find_emcc() -> Path | None:
    found = shutil.which("emcc")
    return Path(found) if found else None


def version() -> str:
    """emscripten's version, from its own file: asking emcc takes longer than a plan may."""
    emcc = find_emcc()
    if emcc is None:
        return ""
    path = emcc.resolve().parent / "emscripten-version.txt"
    return path.read_text().strip().strip('"') if path.is_file() else "unknown"


def source_tree() -> str:
    """The folder that the runtime's sources are taken from; empty: the installed wheels."""
    return os.environ.get(SOURCE_DIR, "")


def compile_runtime(output: Path, scratch: Path) -> None:
    """The runtime's object files, in the folder `output`. Raises MlcBuildError, Unavailable without emcc."""
    tree = scratch / "tvm"
    _gather(tree)
    flags = [*_COMPILE, f"-ffile-prefix-map={tree}=tvm", "-I.", *(f"-I{folder}" for folder in _INCLUDE)]

    def compiled(unit: str) -> None:
        _emcc([*flags, "-c", f"web/emcc/{unit}.cc", "-o", str(output / f"{unit}.o")], tree)

    with ThreadPoolExecutor(len(_UNITS)) as pool:
        list(pool.map(compiled, _UNITS))


def link(objects: Sequence[Path], runtime: Sequence[Path], output: Path, scratch: Path) -> None:
    """One WebAssembly module from a model's objects and the runtime's. Raises MlcBuildError, Unavailable."""
    files = [str(path.absolute()) for path in (*sorted(runtime), *objects)]
    made = scratch / "linked.wasm"
    _emcc([*_LINK, "-o", str(made), *files], scratch)
    shutil.move(made, output)


def _gather(tree: Path) -> None:
    given = source_tree()
    if given:
        origin = Path(given)
        if not (origin / "web" / "emcc" / "wasm_runtime.cc").is_file():
            raise MlcBuildError(f"{SOURCE_DIR} is {given}: no web/emcc/wasm_runtime.cc in it, so no source tree of TVM")
        for part in ("include", "src/runtime", "src/support", "web/emcc", "3rdparty/tvm-ffi", "3rdparty/compiler-rt"):
            shutil.copytree(origin / part, tree / part, ignore=shutil.ignore_patterns(".git"))
        return
    tvm, ffi = _package("tvm"), _package("tvm_ffi")
    for source, part in ((tvm, "include"), (tvm, "src/runtime"), (tvm, "web/emcc")):
        shutil.copytree(source / part, tree / part)
    for part in ("include", "src"):
        shutil.copytree(ffi / part, tree / "3rdparty" / "tvm-ffi" / part)
    shutil.copytree(_HEADERS, tree, dirs_exist_ok=True)


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise Unavailable(f"{name} is not installed: `pip install mlcbuild` brings the version that fits")
    return Path(next(iter(found.submodule_search_locations)))


def _emcc(arguments: Sequence[str], folder: Path) -> None:
    """Run emcc in `folder`. EM_CACHE is left to emscripten, whose system libraries lie there."""
    emcc = find_emcc()
    if emcc is None:
        raise Unavailable(f"no emcc here: {ADVICE}")
    done = subprocess.run([str(emcc), *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MlcBuildError(f"emcc failed ({done.returncode}):\n{(done.stderr.strip() or done.stdout.strip())[-4000:]}")
