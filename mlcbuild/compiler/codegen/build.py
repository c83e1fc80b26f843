"""A module lowered for a GPU in, a library for its host out: what the step `library` does for GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.compiler import binaries, generators
from mlcbuild.compiler.codegen import archive, cuda, rocm
from mlcbuild.compiler.linkers import zig_link
from mlcbuild.compiler.web import emscripten as web
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.types import Linker

_DEVICE_KINDS = ("cuda", "metal", "opencl", "rocm", "hip", "vulkan", "webgpu")


@dataclass(frozen=True)
class Wanted:
    """What to build: `device` and `host` are TVM targets; `prefix` is that of a static library's symbols."""

    device: Mapping[str, Any]
    host: Mapping[str, Any]
    linker: Linker
    architectures: tuple[str, ...]
    prefix: str = ""
    runtime: tuple[Path, ...] = ()  # wasm: object files that are linked in, the runtime


def build_lowered(
    lowered: Path,
    device: Mapping[str, Any],
    host: Mapping[str, Any],
    linker: Linker,
    output: Path,
    scratch: Path,
    dump: Path | None = None,
    architectures: Sequence[str] = (),
    prefix: str = "",
    runtime: Sequence[Path] = (),
) -> None:
    """`build` for a device and a host."""
    wanted = Wanted(device, host, linker, tuple(architectures), prefix, tuple(runtime))
    build(lowered, wanted, output, scratch, dump)


def build(lowered: Path, wanted: Wanted, output: Path, scratch: Path, dump: Path | None = None) -> None:
    """Generate code for the module in `lowered` and link it into `output`; `dump` receives the device's source.

    Raises MlcBuildError with the compiler's or linker's message, Unavailable where a compiler or generator is missing.
    """
    kind = wanted.device["kind"]
    tools = cuda.toolkit() if kind == "cuda" else None
    if tools is not None:
        cuda.load_runtime(tools, scratch)  # before TVM is imported, which looks for it then
    import tvm_ffi
    from tvm import ir, relax, target, transform

    from mlcbuild.compiler.codegen.prefix import with_prefix

    generators.require(wanted.device, wanted.host)
    compiled: list[bytes] = []
    if tools is not None:

        @tvm_ffi.register_global_func("tvm_callback_cuda_compile", override=True)
        def compile_cuda(code: str, *_: object) -> bytes:
            compiled.append(cuda.compile_source(code, tools, wanted.architectures, scratch))
            return compiled[-1]

    if kind == "rocm":

        @tvm_ffi.register_global_func("tvm_callback_rocm_bitcode_path", override=True)
        def no_device_libraries(*_: object) -> list[str]:
            return []

        @tvm_ffi.register_global_func("tvm_callback_rocm_link", override=True)
        def link_rocm(object_code: bytes, *_: object) -> bytes:
            compiled.append(rocm.link(bytes(object_code), scratch))
            return compiled[-1]

    module = ir.load_json(lowered.read_text(encoding="utf-8"))
    system_lib = wanted.linker.kind in ("tar", "wasm")  # found in the program that it is linked into
    if wanted.prefix:
        module = with_prefix(module, wanted.prefix)
    both = target.Target({**wanted.device, "host": dict(wanted.host)})
    # Common subexpressions across TIR leave dangling variables in host code (docs/tvm.md).
    with both, transform.PassContext(opt_level=3, config={"tirx.disable_cse_tir": True}):
        executable = relax.build(module, target=both, relax_pipeline=None, system_lib=system_lib)
    if dump is not None:
        _dump(executable.mod, dump)
    executable.export_library(str(output), fcompile=_linker(wanted, scratch), workspace_dir=str(scratch))
    if kind in ("cuda", "rocm") and not compiled:
        raise MlcBuildError(
            f"TVM did not compile the {kind} kernels: its library for {kind} does not load here, "
            "and the result would hold source instead of machine code"
        )
    binaries.check(output, wanted.host["mtriple"], [scratch], wanted.prefix)


def _linker(wanted: Wanted, scratch: Path) -> Any:
    """The function that TVM gives object files to."""

    def link(path: str, objects: list[str], options: object = None, **_: object) -> None:
        files = [Path(name) for name in objects]
        if wanted.linker.kind == "tar":
            archive.write_tar(files, Path(path), wanted.prefix)
        elif wanted.linker.kind == "wasm":
            web.link(files, wanted.runtime, Path(path), scratch)
        else:
            zig_link(files, Path(path), wanted.linker.target, wanted.linker, scratch)

    link.object_format = "o"  # type: ignore[attr-defined]
    if wanted.linker.kind == "tar":
        link.output_format = "tar"  # type: ignore[attr-defined]
    if wanted.linker.kind in ("tar", "wasm"):
        link.need_system_lib = True  # type: ignore[attr-defined]
    return link


def _dump(module: Any, dump: Path) -> None:
    """The source of the device's code, and the host's LLVM IR."""
    dump.mkdir(parents=True, exist_ok=True)
    for imported in module.imports:
        if imported.kind == "llvm":
            (dump / "library.ll").write_text(imported.inspect_source("ll"))
        elif imported.kind in _DEVICE_KINDS:
            try:
                (dump / f"kernels.{imported.kind}").write_text(imported.inspect_source())
            except RuntimeError:  # machine code only
                continue
        _dump(imported, dump)
