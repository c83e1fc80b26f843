"""A module lowered for Vulkan in, a library for its host out: what the step `library` does for Vulkan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlcbuild.compiler import generators
from mlcbuild.compiler.link import export
from mlcbuild.compiler.link.linkers import zig_link
from mlcbuild.compiler.vulkan import kernel, packing, validator
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.types import Linker

_SHARED_MEMORY = 16384  # bytes; what every Vulkan device has
_PLACEHOLDER = "opencl"  # a kind of module that TVM makes here without a kernel in it


def build(
    lowered: Path,
    device: Mapping[str, Any],
    host: Mapping[str, Any],
    linker: Linker,
    output: Path,
    scratch: Path,
    debug_dump: Path | None = None,
) -> None:
    """Generate code for the module in `lowered` and link it into `output`; `debug_dump` receives SPIR-V and LLVM IR.

    `device` and `host` are TVM targets. Raises MlcBuildError with the linker's message, with spirv-val's where that is
    on the search path and does not accept a kernel, and where a kernel has what SPIR-V or the device lacks; Unavailable
    where TVM has no code generator for the host.
    """
    import tvm_ffi
    from tvm import IRModule, get_global_func, target

    from mlcbuild.compiler import canonical

    for kind in (_PLACEHOLDER, "llvm"):
        generators.require({"kind": kind}, host)
    kernels: list[kernel.Kernel] = []

    def generate(functions: Any, _: object) -> Any:
        shared = int(device.get("max_shared_memory_per_block", _SHARED_MEMORY))
        kernels.extend(kernel.translate(each, shared) for each in functions.functions.values())
        return get_global_func(f"target.build.{_PLACEHOLDER}")(IRModule({}), target.Target(_PLACEHOLDER))

    tvm_ffi.register_global_func("target.build.vulkan", generate, override=True)

    def pack(module: Any, _system: bool, _prefix: str, folder: str) -> str:
        """An object file with everything that is not machine code of the host."""
        blob = get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
        packed = packing.replace(blob, _PLACEHOLDER, packing.content(kernels))
        path = str(Path(folder) / "devc.o")
        get_global_func("codegen.codegen_blob")(packed, False, json.dumps(dict(host)), "").write_to_file(path)
        return path

    executable = export.generate(canonical.from_text(lowered.read_text(encoding="utf-8")), device, host)
    if debug_dump is not None:
        export.dump_sources(executable.mod, debug_dump, kinds=())
        for each in kernels:
            (debug_dump / f"{each.name}.spv").write_bytes(packing.binary(each))
    _check_features(kernels, device)
    validator.validate(kernels, scratch)

    def link(objects: list[Path], path: Path) -> None:
        zig_link(objects, path, linker.target, linker, scratch)

    export.export(executable, link, output, scratch, host["mtriple"], pack=pack)


def _check_features(kernels: Sequence[kernel.Kernel], device: Mapping[str, Any]) -> None:
    for each in kernels:
        lacking = sorted(name for name in each.features if not device.get(f"supports_{name}"))
        if lacking:
            raise MlcBuildError(
                f"kernel {each.name}: needs {', '.join(lacking)}, which the target's `supports` does not list"
            )
