"""Is a linked library what its target says? Its format, its processor, the entry that TVM looks for, no paths of here.

Formats: the System V ABI (ELF), Apple's <mach-o/loader.h>, Microsoft's PE specification.
"""

from __future__ import annotations

import os
import struct
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from mlcbuild.errors import MlcBuildError

ENTRY = b"__tvm_ffi__library_bin"  # where tvm_ffi.load_module finds the module's functions

_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
_MACH_CPUS = {0x01000007: "x86_64", 0x0100000C: "aarch64"}
_PE_MACHINES = {0x8664: "x86_64", 0xAA64: "aarch64"}
_SYMTAB = 2  # LC_SYMTAB
_EXTERNAL, _DEFINED = 0x01, 0x0E  # N_EXT, and the type N_SECT


def check(path: Path, triple: str, hidden: Sequence[Path] = ()) -> None:
    """Raises MlcBuildError where the library at `path` is not for the zig `triple`, exports no entry, or names a path.

    `hidden` are folders whose names must not be in it, besides this machine's home and installed packages.
    """
    data = path.read_bytes()
    system = "macos" if "-macos" in triple or "-ios" in triple else "windows" if "-windows" in triple else "linux"
    read = {"linux": _elf, "macos": _mach, "windows": _pe}[system]
    wanted = triple.split("-")[0]
    try:
        machine, exported = read(data)
    except (struct.error, IndexError, ValueError) as error:
        raise MlcBuildError(f"{path.name}: the linker made no library for {triple}: {error}") from None
    if machine != wanted:
        raise MlcBuildError(f"{path.name}: the linker made code for {machine}, the target says {wanted}")
    if ENTRY not in exported:
        raise MlcBuildError(f"{path.name}: exports no {ENTRY.decode()}, so no runtime could open it")
    places = {*map(str, hidden), str(Path.home()), sysconfig.get_path("purelib")} - {os.sep}
    named = sorted(place for place in places if place.encode() in data)
    if named:
        raise MlcBuildError(f"{path.name}: names {', '.join(named)}, so it would differ on another machine")


def _elf(data: bytes) -> tuple[str, set[bytes]]:
    """The machine and the names that a 64-bit little-endian ELF file's dynamic symbol table defines."""
    if data[:6] != b"\x7fELF\2\1":
        raise ValueError("not a 64-bit ELF file")
    machine = struct.unpack_from("<H", data, 18)[0]
    at, size, count = struct.unpack_from("<Q10xHH", data, 40)[0], *struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, at + i * size) for i in range(count)]
    exported = set()
    for kind, start, length, link in ((s[1], s[4], s[5], s[6]) for s in sections):
        if kind == 11:  # SHT_DYNSYM
            for entry in range(start, start + length, 24):
                name, _, _, section = struct.unpack_from("<IBBH", data, entry)
                if section:
                    exported.add(_string(data, sections[link][4] + name))
    return _name(_ELF_MACHINES, machine), exported


def _mach(data: bytes) -> tuple[str, set[bytes]]:
    """The same of a 64-bit Mach-O file; names without the underscore that C's get."""
    if data[:4] != b"\xcf\xfa\xed\xfe":
        raise ValueError("not a 64-bit Mach-O file")
    machine, commands = struct.unpack_from("<I", data, 4)[0], struct.unpack_from("<I", data, 16)[0]
    at, exported = 32, set()
    for _ in range(commands):
        command, size = struct.unpack_from("<II", data, at)
        if command == _SYMTAB:
            symbols, count, strings = struct.unpack_from("<III", data, at + 8)
            for entry in range(symbols, symbols + 16 * count, 16):
                name, kind = struct.unpack_from("<IB", data, entry)
                if kind & _EXTERNAL and kind & _DEFINED == _DEFINED:
                    exported.add(_string(data, strings + name).removeprefix(b"_"))
        at += size
    return _name(_MACH_CPUS, machine), exported


def _pe(data: bytes) -> tuple[str, set[bytes]]:
    """The same of a 64-bit PE file."""
    header = struct.unpack_from("<I", data, 60)[0]
    if data[:2] != b"MZ" or data[header : header + 4] != b"PE\0\0":
        raise ValueError("not a PE file")
    machine, sections, optional = (struct.unpack_from("<H", data, header + at)[0] for at in (4, 6, 20))
    table = header + 24 + optional
    places = [struct.unpack_from("<IIII", data, table + 40 * i + 8) for i in range(sections)]

    def offset(address: int) -> int:
        for size, start, stored, at in places:
            if start <= address < start + max(size, stored):
                return int(at + address - start)
        raise ValueError(f"no section holds the address {address:#x}")

    directory = struct.unpack_from("<I", data, header + 24 + 112)[0]  # of exports; PE32+
    exported = set()
    if directory:
        at = offset(directory)
        count, names = struct.unpack_from("<I", data, at + 24)[0], offset(struct.unpack_from("<I", data, at + 32)[0])
        exported = {_string(data, offset(struct.unpack_from("<I", data, names + 4 * i)[0])) for i in range(count)}
    return _name(_PE_MACHINES, machine), exported


def _name(known: dict[int, str], machine: int) -> str:
    return known.get(machine, f"machine {machine}")


def _string(data: bytes, at: int) -> bytes:
    return data[at : data.index(b"\0", at)]
