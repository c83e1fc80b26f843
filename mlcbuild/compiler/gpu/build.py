"""A module lowered for a GPU in, a library for its host out: what the step `library` does for GPUs and browsers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlcbuild.compiler import generators
from mlcbuild.compiler.gpu import cuda, sources
from mlcbuild.compiler.gpu.device import device_of
from mlcbuild.compiler.link import export, static
from mlcbuild.compiler.link.linkers import zig_link
from mlcbuild.compiler.web import emscripten
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.types import Linker
from mlcbuild.zig import run_zig


def build(
    lowered: Path,
    device: Mapping[str, Any],
    host: Mapping[str, Any],
    linker: Linker,
    output: Path,
    scratch: Path,
    debug_dump: Path | None = None,
    architectures: Sequence[str] = (),
    prefix: str = "",
    runtime: Sequence[Path] = (),
    compile_cuda: Callable[[str], bytes] | None = None,
) -> None:
    """Generate code for the module in `lowered` and link it into `output`; `debug_dump` receives the device's source.

    `device` and `host` are TVM targets; `architectures` get machine code; `prefix` is that of a static library's
    symbols; `runtime` are the object files of TVM's runtime for browsers; `compile_cuda` takes nvcc's place (CUDA
    source in, a module's image out). Raises MlcBuildError with the compiler's or linker's message, Unavailable where a
    compiler or generator is missing.
    """
    kind = device["kind"]
    if kind == "cuda" and compile_cuda is None:
        tools = cuda.toolkit()
        cuda.load_runtime(tools, scratch)  # before TVM is imported, which looks for it then
        compile_cuda = functools.partial(cuda.compile_source, tools=tools, architectures=architectures, scratch=scratch)
    from mlcbuild.compiler import canonical

    generators.require(device, host)
    compiled: list[bytes] = []
    if compile_cuda is not None:
        make, early = compile_cuda, device_of(device).early
        _answer("tvm_callback_cuda_compile", lambda code, *_: make(sources.complete(code, early)), compiled)
    if kind == "rocm":
        _answer("tvm_callback_rocm_bitcode_path", lambda *_: [], [])  # no libraries for the device
        _answer("tvm_callback_rocm_link", lambda code, *_: _link_rocm(bytes(code), scratch), compiled)
    if kind == "webgpu":
        wide_wgsl()
    module = canonical.from_text(lowered.read_text(encoding="utf-8"))
    if prefix:
        module = static.with_prefix(module, prefix)

    def link(objects: list[Path], path: Path) -> None:
        if linker.kind == "tar":
            static.write_tar(objects, path, prefix)
        elif linker.kind == "wasm":
            emscripten.link(objects, runtime, path, scratch)
        else:
            zig_link(objects, path, linker.target, linker, scratch)

    executable = export.generate(module, device, host, linker.kind)
    if debug_dump is not None:
        export.dump_sources(executable.mod, debug_dump)
    export.export(executable, link, output, scratch, host["mtriple"], kind=linker.kind, prefix=prefix)
    if kind in ("cuda", "rocm") and not compiled:
        raise MlcBuildError(
            f"TVM did not compile the {kind} kernels: its library for {kind} does not load here, "
            "and the result would hold source instead of machine code"
        )


def _link_rocm(object_code: bytes, scratch: Path) -> bytes:
    """An HSA code object of what LLVM made for an AMD GPU, by zig's lld, without ROCm."""
    source, output = scratch / "kernels.o", scratch / "kernels.hsaco"
    source.write_bytes(object_code)
    run_zig(["ld.lld", "-shared", "--no-undefined", "-o", str(output), str(source)], scratch / "zig")
    return output.read_bytes()


def wide_wgsl() -> None:
    """From now on, TVM's generator of WGSL is given kernels with buffers of vectors."""
    from mlcbuild.compiler.gpu import wide_buffers

    generate = _tvm_wgsl()
    _answer("target.build.webgpu", lambda functions, target: generate(wide_buffers.widened(functions), target), [])


@functools.cache
def _tvm_wgsl() -> Callable[..., Any]:
    """TVM's own, before another takes its place."""
    from tvm import get_global_func

    found: Callable[..., Any] = get_global_func("target.build.webgpu")
    return found


def _answer(name: str, function: Callable[..., Any], answers: list[Any]) -> None:
    """TVM calls `function` for what it knows by this name; what came of it is appended to `answers`."""
    import tvm_ffi

    def answer(*given: Any) -> Any:
        answers.append(function(*given))
        return answers[-1]

    tvm_ffi.register_global_func(name, answer, override=True)
