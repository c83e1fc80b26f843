"""A lowered module and a target in, a shared library out: what the step `library` does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tvm import IRModule, ir, relax, target, transform

from mlcbuild.compiler import binaries, generators
from mlcbuild.compiler.cpu import sources
from mlcbuild.compiler.cpu.sources import Source
from mlcbuild.compiler.linkers import zig_compile, zig_link
from mlcbuild.compiler.targets import zig_cpu
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.types import Linker

_KERNELS = Path(__file__).parent / "cpu" / "kernels"
_HOSTS = {"x86_64-linux-gnu": "x86_64-linux-gnu.2.28", "aarch64-linux-gnu": "aarch64-linux-gnu.2.28"}


def build_lowered(
    lowered: Path,
    device: Mapping[str, Any],
    host: Mapping[str, Any],
    linker: Linker,
    output: Path,
    scratch: Path,
    dump: Path | None = None,
) -> None:
    """`build` the module in the file `lowered`."""
    build(ir.load_json(lowered.read_text(encoding="utf-8")), device, linker, output, scratch, dump)


def build(
    module: IRModule, device: Mapping[str, Any], linker: Linker, output: Path, scratch: Path, dump: Path | None = None
) -> None:
    """Generate code for `module`, compile the C kernels for the same CPU, and link both into `output`.

    `device` is the resolved TVM target. `dump` receives the LLVM IR, the kernels' sources and the commands.
    Raises MlcBuildError with the linker's own message when it fails, Unavailable where TVM has no such generator.
    """
    generators.require(device, device)
    triple = link_target(linker, device)
    needed = sources.attached(module)
    kernels, commands = _compile_kernels(needed, triple, zig_cpu(device), scratch)

    def link(path: str, objects: list[str], options: object = None, **_: object) -> None:
        commands.append(zig_link([*map(Path, objects), *kernels], Path(path), triple, linker, scratch))

    # Common subexpressions across TIR leave dangling variables in host code (docs/tvm.md).
    with target.Target(dict(device)), transform.PassContext(opt_level=3, config={"tirx.disable_cse_tir": True}):
        executable = relax.build(module, target=target.Target(dict(device)), relax_pipeline=None)
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / "library.ll").write_text(executable.mod.imports[0].inspect_source("ll"))
    executable.export_library(str(output), fcompile=link, workspace_dir=str(scratch))
    binaries.check(output, triple, [scratch])
    if dump is not None:
        _dump_kernels(needed, commands, dump)


def link_target(linker: Linker, device: Mapping[str, Any]) -> str:
    """The zig triple to link for; `native` means this machine's system with a glibc old enough to be portable."""
    if linker.target != "native":
        return linker.target
    triple = device.get("mtriple")
    if triple not in _HOSTS:
        raise MlcBuildError(f"linker target `native` is not known for {triple}; name a zig triple in the target's file")
    return _HOSTS[triple]


def _compile_kernels(needed: Sequence[Source], triple: str, cpu: str, scratch: Path) -> tuple[list[Path], list[str]]:
    """Objects of the C sources, compiled side by side, and the commands that made them."""

    def compiled(source: Source) -> tuple[Path, str]:
        output = scratch / f"{source.name}.o"
        return output, zig_compile(_KERNELS / source.file, output, triple, cpu, scratch / "zig", source.defines)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(compiled, needed))
    return [path for path, _ in made], [command for _, command in made]


def _dump_kernels(needed: Sequence[Source], commands: Sequence[str], dump: Path) -> None:
    """The C files that were compiled with the headers beside them, and `commands.sh`: what compiled and linked them."""
    folder = dump / "kernels"
    folder.mkdir(exist_ok=True)
    for path in sorted({_KERNELS / source.file for source in needed} | {*_KERNELS.glob("*.h")}):
        shutil.copyfile(path, folder / path.name)
    (dump / "commands.sh").write_text("".join(f"{command}\n" for command in commands))
