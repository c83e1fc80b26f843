"""A lowered module in, a library out: what the builds of all backends share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlcbuild.compiler.link import binaries

IN_A_PROGRAM = ("tar", "wasm")  # kinds of linkers whose library is found in the program that it is linked into
_DEVICE_KINDS = ("cuda", "metal", "opencl", "rocm", "hip", "vulkan", "webgpu")  # TVM's kinds of modules for GPUs


def generate(module: Any, device: Mapping[str, Any], host: Mapping[str, Any], kind: str = "zig") -> Any:
    """TVM's executable of a lowered module, for a linker of this kind; without a `host`, the device is the host."""
    from tvm import relax, target, transform

    both = target.Target({**device, "host": dict(host)} if host else dict(device))
    # Common subexpressions across TIR leave dangling variables in host code (docs/tvm.md).
    with both, transform.PassContext(opt_level=3, config={"tirx.disable_cse_tir": True}):
        return relax.build(module, target=both, relax_pipeline=None, system_lib=kind in IN_A_PROGRAM)


def export(
    executable: Any,
    link: Callable[[list[Path], Path], object],
    output: Path,
    scratch: Path,
    triple: str,
    *,
    kind: str = "zig",
    prefix: str = "",
    pack: Callable[..., str] | None = None,
) -> None:
    """The executable as the library `output`, which `link` makes of object files; `triple` is what it must be for.

    `kind` is the linker's, `prefix` that of a static library's symbols; `pack` writes what is not machine code of the
    host. Raises MlcBuildError with the linker's message, and where the library is not what its target says.
    """

    def linked(path: str, objects: list[str], options: object = None, **_: object) -> None:
        link([*map(Path, objects)], Path(path))

    linked.object_format = "o"  # type: ignore[attr-defined]
    if kind == "tar":
        linked.output_format = "tar"  # type: ignore[attr-defined]
    if kind in IN_A_PROGRAM:
        linked.need_system_lib = True  # type: ignore[attr-defined]
    packed = {"fpack_imports": pack} if pack is not None else {}
    executable.export_library(str(output), fcompile=linked, workspace_dir=str(scratch), **packed)
    binaries.check(output, triple, [scratch], prefix)


def dump_sources(module: Any, dump: Path, kinds: Sequence[str] = _DEVICE_KINDS) -> None:
    """The host's LLVM IR, and the source of the device's code where it has any, into the folder `dump`."""
    dump.mkdir(parents=True, exist_ok=True)
    for imported in module.imports:
        if imported.kind == "llvm":
            (dump / "library.ll").write_text(imported.inspect_source("ll"))
        elif imported.kind in kinds:
            try:
                (dump / f"kernels.{imported.kind}").write_text(imported.inspect_source())
            except RuntimeError:  # machine code only
                continue
        dump_sources(imported, dump, kinds)
