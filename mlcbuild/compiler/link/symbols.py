"""What object files and libraries say of themselves: their processor, and the names that others can use.

Formats: the System V ABI (ELF), Apple's <mach-o/loader.h>, Microsoft's PE specification, WebAssembly's core
specification (binary format). All are 64-bit and little-endian but WebAssembly.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
_MACH_CPUS = {0x01000007: "x86_64", 0x0100000C: "aarch64"}
_PE_MACHINES = {0x8664: "x86_64", 0xAA64: "aarch64"}
_RELOCATABLE, _SYMBOLS, _DYNAMIC_SYMBOLS = 1, 2, 11  # ET_REL, SHT_SYMTAB, SHT_DYNSYM
_SYMTAB = 2  # LC_SYMTAB
_PRIVATE, _EXTERNAL, _DEFINED = 0x10, 0x01, 0x0E  # N_PEXT, N_EXT, and the type N_SECT


@dataclass(frozen=True)
class Binary:
    """`exported` are the names it defines for others; `imported`, of WebAssembly only, what it wants: `module.name`."""

    machine: str
    exported: frozenset[str]
    imported: frozenset[str] = frozenset()


def read(data: bytes, system: str) -> Binary:
    """What `data` is, a file for `system`: linux, macos, windows or wasm.

    Raises ValueError where it is not of the system's format, or cut off.
    """
    try:
        return _READERS[system](data)
    except (struct.error, IndexError) as error:
        raise ValueError(f"it is cut off: {error}") from None


def _elf(data: bytes) -> Binary:
    """A library's dynamic symbols, an object file's global ones."""
    if data[:6] != b"\x7fELF\2\1":
        raise ValueError("not a 64-bit ELF file")
    kind, machine = struct.unpack_from("<HH", data, 16)
    at, size, count = struct.unpack_from("<Q10xHH", data, 40)[0], *struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, at + i * size) for i in range(count)]
    wanted = _SYMBOLS if kind == _RELOCATABLE else _DYNAMIC_SYMBOLS
    exported = set()
    for start, length, link in ((s[4], s[5], s[6]) for s in sections if s[1] == wanted):
        for entry in range(start, start + length, 24):
            name, info, _, section = struct.unpack_from("<IBBH", data, entry)
            if section and info >> 4:  # defined, and not local
                exported.add(_string(data, sections[link][4] + name))
    return Binary(_name(_ELF_MACHINES, machine), frozenset(exported))


def _mach(data: bytes) -> Binary:
    """Names without the underscore that C's get."""
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
                if kind & (_PRIVATE | _EXTERNAL) == _EXTERNAL and kind & _DEFINED == _DEFINED:
                    exported.add(_string(data, strings + name).removeprefix("_"))
        at += size
    return Binary(_name(_MACH_CPUS, machine), frozenset(exported))


def _pe(data: bytes) -> Binary:
    header = struct.unpack_from("<I", data, 60)[0] if data[:2] == b"MZ" else 0
    if not header or data[header : header + 4] != b"PE\0\0":
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
    return Binary(_name(_PE_MACHINES, machine), frozenset(exported))


def _wasm(data: bytes) -> Binary:
    if data[:8] != b"\0asm\1\0\0\0":
        raise ValueError("not a WebAssembly module")
    exported, imported = set(), set()
    at = 8
    while at < len(data):
        section = data[at]
        length, at = _leb(data, at + 1)
        end = at + length
        if section in (2, 7):  # imports, exports
            count, at = _leb(data, at)
            for _ in range(count):
                name, at = _vector(data, at)
                if section == 7:
                    exported.add(name)
                    at = _leb(data, at + 1)[1]
                else:
                    field, at = _vector(data, at)
                    imported.add(f"{name}.{field}")
                    at = _described(data, at)
        at = end
    return Binary("wasm32", frozenset(exported), frozenset(imported))


def _described(data: bytes, at: int) -> int:
    """Where an import's description ends: a function, a table, a memory or a global."""
    kind = data[at]
    if kind == 0:
        return _leb(data, at + 1)[1]
    if kind == 3:
        return at + 3
    at += 2 if kind == 1 else 1
    bounded = data[at] & 1
    at = _leb(data, at + 1)[1]
    return _leb(data, at)[1] if bounded else at


def _leb(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned LEB128 number, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _vector(data: bytes, at: int) -> tuple[str, int]:
    length, at = _leb(data, at)
    return data[at : at + length].decode(), at + length


def _name(known: dict[int, str], machine: int) -> str:
    return known.get(machine, f"machine {machine}")


def _string(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


_READERS: dict[str, Callable[[bytes], Binary]] = {"linux": _elf, "macos": _mach, "windows": _pe, "wasm": _wasm}
