"""Kernels in the form that TVM's Vulkan runtime loads, and their place among what a library carries.

A library holds a blob: eight bytes with the length of the rest; the import tree, as two lists of numbers of eight bytes
each; then each module's kind and content, and for the library's own machine code the kind `_lib` alone. A list begins
with its length, and so does a text. The runtime hands each content to `ffi.Module.load_from_bytes.<kind>`. A module of
Vulkan's is the text `vulkan`, a map from names to functions (name, parameters, tags of a launch, tags of parameters),
and a map from names to shaders: a flag of four bytes, then the SPIR-V words.

TVM here cannot make a module of that kind, so a module of another kind, without a kernel in it, holds its place.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from mlcbuild.compiler.vulkan.kernel import Kernel

_KIND = "vulkan"
_MACHINE_CODE = "_lib"
# DLPack: code, bits and lanes of a dtype.
_CODES = {"int": 0, "uint": 1, "float": 2}
_HANDLE = (3, 64, 1)


def content(kernels: Sequence[Kernel]) -> bytes:
    """A module with these kernels."""
    named = sorted(kernels, key=lambda kernel: kernel.name)
    functions = b"".join(_text(each.name) + _function(each) for each in named)
    shaders = b"".join(_text(each.name) + _text(_shader(each)) for each in named)
    return _text(_KIND) + _count(named) + functions + _count(named) + shaders


def replace(blob: bytes, placeholder: str, module: bytes) -> bytes:
    """`blob` with a Vulkan module instead of its one module of the kind `placeholder`."""
    at = 8
    for _ in range(2):
        (numbers,) = struct.unpack_from("<Q", blob, at)
        at += 8 + 8 * numbers
    parts, found = [blob[8:at]], 0
    while at < len(blob):
        kind, at = _read(blob, at)
        if kind == _MACHINE_CODE.encode():
            parts.append(_text(kind))
            continue
        bytes_of, at = _read(blob, at)
        if kind == placeholder.encode():
            kind, bytes_of, found = _KIND.encode(), module, found + 1
        parts += [_text(kind), _text(bytes_of)]
    if found != 1:
        raise ValueError(f"{found} modules of the kind {placeholder}, and not one")
    rest = b"".join(parts)
    return struct.pack("<Q", len(rest)) + rest


def _function(kernel: Kernel) -> bytes:
    return b"".join(
        [
            _text(kernel.name),
            _count(kernel.parameters),
            *(struct.pack("<BBH", *_dtype(each)) for each in kernel.parameters),
            _count(kernel.launch),
            *map(_text, kernel.launch),
            _count(kernel.parameters),
            bytes(4 * len(kernel.parameters)),  # no parameter has a tag
        ]
    )


def _dtype(name: str) -> tuple[int, int, int]:
    if name == "handle":
        return _HANDLE
    code = name.rstrip("0123456789")
    return _CODES[code], int(name.removeprefix(code)), 1


def binary(kernel: Kernel) -> bytes:
    """The SPIR-V module as a file."""
    return struct.pack(f"<{len(kernel.words)}I", *kernel.words)


def _shader(kernel: Kernel) -> bytes:
    return struct.pack("<IQ", kernel.flag, len(kernel.words)) + binary(kernel)


def _count(items: Sequence[object]) -> bytes:
    return struct.pack("<Q", len(items))


def _text(text: str | bytes) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text


def _read(blob: bytes, at: int) -> tuple[bytes, int]:
    """The text at `at`, and where the next thing begins."""
    (size,) = struct.unpack_from("<Q", blob, at)
    return blob[at + 8 : at + 8 + size], at + 8 + size
