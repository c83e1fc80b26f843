"""AMD machine code: LLVM's objects linked to code objects by zig's lld, without ROCm."""

from __future__ import annotations

from pathlib import Path

from mlcbuild.zig import run_zig


def link(object_code: bytes, scratch: Path) -> bytes:
    """An HSA code object of what LLVM made for an AMD GPU. Raises MlcBuildError with the linker's message."""
    source, output = scratch / "kernels.o", scratch / "kernels.hsaco"
    source.write_bytes(object_code)
    run_zig(["ld.lld", "-shared", "--no-undefined", "-o", str(output), str(source)], scratch / "zig")
    return output.read_bytes()
