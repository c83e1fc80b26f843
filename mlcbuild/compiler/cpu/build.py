"""A module lowered for a CPU in, a library with its C kernels out: what the step `library` does for CPUs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlcbuild.compiler import generators
from mlcbuild.compiler.cpu.sources import Source, attached
from mlcbuild.compiler.link import export
from mlcbuild.compiler.link.linkers import zig_compile, zig_link
from mlcbuild.compiler.targets import zig_cpu
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.types import Linker

_KERNELS = Path(__file__).parent / "kernels"
_HOSTS = {"x86_64-linux-gnu": "x86_64-linux-gnu.2.28", "aarch64-linux-gnu": "aarch64-linux-gnu.2.28"}


def build(
    lowered: Path,
    device: Mapping[str, Any],
    host: Mapping[str, Any],
    linker: Linker,
    output: Path,
    scratch: Path,
    debug_dump: Path | None = None,
) -> None:
    """Generate code for the module in `lowered`, compile the C kernels for the same CPU, and link both into `output`.

    `device` is the resolved TVM target; it is its own `host`. `debug_dump` receives the LLVM IR, the kernels' sources
    and the commands. Raises MlcBuildError with the linker's own message when it fails, Unavailable where TVM has no
    such generator.
    """
    generators.require(device, device)
    from mlcbuild.compiler import canonical

    module = canonical.from_text(lowered.read_text(encoding="utf-8"))
    triple = link_target(linker, device)
    needed = attached(module)
    kernels, commands = _compile_kernels(needed, triple, zig_cpu(device), scratch)

    def link(objects: list[Path], path: Path) -> None:
        commands.append(zig_link([*objects, *kernels], path, triple, linker, scratch))

    executable = export.generate(module, device, host={})
    if debug_dump is not None:
        export.dump_sources(executable.mod, debug_dump)
    export.export(executable, link, output, scratch, triple)
    if debug_dump is not None:
        _dump_kernels(needed, commands, debug_dump)


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
