"""Whether a produced file is what its target says: format and processor of every part, and no path of this machine."""

from __future__ import annotations

import struct
import tarfile
from pathlib import Path

from mlcbuild.errors import MlcBuildError

_ELF = {62: "x86_64", 183: "aarch64"}
_MACH = {0x01000007: "x86_64", 0x0100000C: "aarch64"}
_PE = {0x8664: "x86_64", 0xAA64: "aarch64"}
ENTRY = b"__tvm_ffi__library_bin"  # what TVM's runtime looks for in a library; static ones register it under a prefix


def check(path: Path, triple: str, machine_paths: list[str]) -> None:
    """Raise MlcBuildError where the library at `path` is not for the host `triple`, or names one of the paths."""
    parts = {path.name: path.read_bytes()}
    if path.suffix == ".tar":
        with tarfile.open(path) as archive:
            parts = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    wanted = _of_triple(triple)
    for name, content in parts.items():
        found = _of_file(content)
        if found != wanted:
            raise MlcBuildError(f"{name}: is {' '.join(found)}, but the target's host is {triple}")
        for each in machine_paths:
            if each.encode() in content:
                raise MlcBuildError(f"{name}: holds the path {each} of this machine")
    if not any(ENTRY in content for content in parts.values()):
        raise MlcBuildError(f"{path.name}: has no {ENTRY.decode()}, so TVM's runtime cannot open it")


def _of_triple(triple: str) -> tuple[str, str]:
    machine = triple.partition("-")[0].replace("arm64", "aarch64")
    if machine == "wasm32":
        return "WebAssembly", machine
    return ("Mach-O" if "apple" in triple else "PE" if "windows" in triple else "ELF"), machine


def _of_file(head: bytes) -> tuple[str, str]:
    """Format and processor, `unknown` where the first bytes do not tell."""
    unknown = "unknown", "unknown"
    if head[:4] == b"\x7fELF":
        return "ELF", _ELF.get(struct.unpack_from("<H", head, 18)[0], "unknown")
    if head[:4] == b"\xcf\xfa\xed\xfe":
        return "Mach-O", _MACH.get(struct.unpack_from("<I", head, 4)[0], "unknown")
    if head[:2] == b"MZ":
        at = struct.unpack_from("<I", head, 60)[0]
        return "PE", _PE.get(struct.unpack_from("<H", head, at + 4)[0], "unknown")
    return ("WebAssembly", "wasm32") if head[:4] == b"\0asm" else unknown
