"""The header of a GGUF file, read strictly: facts about the model, and where its tensors lie.

Format (ggml-org/ggml docs/gguf.md, versions 2 and 3, little-endian): `GGUF`, the version (uint32), the numbers of
tensors and of facts (uint64 each); the facts: a key (its length as uint64, UTF-8), a type (uint32), a value; the
tensors: a name, the number of dimensions (uint32), the dimensions (uint64, the fastest first), a type (uint32), an
offset (uint64) from the start of the data; padding to a multiple of `general.alignment` (32); the data.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlcbuild.checkpoints.header import MOST_TENSORS, refused_name
from mlcbuild.errors import POINTER, CheckpointError, pointer

Bytes = Callable[[str, int, int], bytes]  # those of a file, from an offset on, so many
_MAGIC = b"GGUF"
_STRING, _ARRAY, _FLOAT, _BOOL = 8, 9, 6, 7
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MOST_FACTS, MOST_DIMENSIONS, MOST_VALUES = 10_000, 8, 10_000_000  # values: of a list
LARGEST_HEADER = 256 << 20  # bytes
_END = 1 << 42  # bytes that no file has (mlcbuild.checkpoints.listing), and no tensor


class Truncated(CheckpointError):
    """The file ends within its header."""


@dataclass(frozen=True)
class Tensor:
    """`shape` is row-major, as NumPy has it; `offset` counts from the start of `file`; `kind` is ggml's number."""

    name: str
    file: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """`facts` by key: numbers, texts, lists of them. A float32 is the shortest number that rounds to it."""

    file: str
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def architecture(self) -> str:
        """Raises CheckpointError where the file does not say it."""
        name = self.facts.get("general.architecture")
        if not isinstance(name, str):
            raise CheckpointError(f"{self.file}: says no general.architecture, so nothing is known of the model")
        return name


def read_header(path: Path, file: str = "") -> Header:
    """The header of a file that is here; `file` is what messages call it. Raises CheckpointError for a damaged one."""
    with path.open("rb") as stream:
        if not stream.seek(0, 2):
            raise Truncated(f"{file or path}: truncated: the file is empty")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return parse(content, file or str(path))


def parse(content: bytes | mmap.mmap, file: str) -> Header:
    """The header that `content` begins with. Raises CheckpointError for what is none, Truncated for a part of one."""
    if content[:8] == POINTER[:8]:
        raise CheckpointError(pointer(file))
    if content[:4] != _MAGIC[: len(content)]:
        raise CheckpointError(f"{file}: not a GGUF file: it begins with {bytes(content[:4])!r}")
    reader = _Reader(content, file)
    version, tensors, count = reader.numbers("IQQ")
    if version not in (2, 3):
        big = version in (2 << 24, 3 << 24)
        said = "its numbers are big-endian" if big else f"version {version} of GGUF"
        raise CheckpointError(f"{file}: {said}, and only versions 2 and 3, little-endian, are read: convert it again")
    if tensors > MOST_TENSORS or count > MOST_FACTS:
        raise CheckpointError(
            f"{file}: {tensors:,} tensors and {count:,} facts; at most {MOST_TENSORS:,} and {MOST_FACTS:,} are read"
        )
    facts: dict[str, Any] = {}
    for _ in range(count):
        key = reader.text()
        if key in facts:
            raise CheckpointError(f"{file}: the fact {key!r:.100} occurs twice")
        facts[key] = reader.value(*reader.numbers("I"))
    alignment = facts.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise CheckpointError(f"{file}: general.alignment is {alignment!r:.40}, expected a number of bytes")
    found = [reader.tensor() for _ in range(tensors)]
    start = -(-reader.position // alignment) * alignment
    table = {each.name: replace(each, offset=start + each.offset) for each in found}
    if len(table) < len(found):
        raise CheckpointError(f"{file}: two tensors have one name")
    return Header(file, facts, table)


class _Reader:
    def __init__(self, content: bytes | mmap.mmap, file: str) -> None:
        self._content, self._file, self.position = content, file, len(_MAGIC)

    def numbers(self, form: str) -> tuple[Any, ...]:
        form = f"<{form}"
        found = struct.unpack_from(form, self._content, self._skip(struct.calcsize(form)))
        return found

    def text(self) -> str:
        (length,) = self.numbers("Q")
        begin = self._skip(length)
        try:
            return bytes(self._content[begin : begin + length]).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self._file}: not a GGUF file: a text at byte {begin} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._list()
        if kind not in _NUMBERS:
            raise CheckpointError(f"{self._file}: not a GGUF file: a fact has the type {kind}")
        (number,) = self.numbers(_NUMBERS[kind])
        return _shortest(number) if kind == _FLOAT else number

    def _list(self) -> list[Any]:
        kind, count = self.numbers("IQ")
        if count > MOST_VALUES:
            raise CheckpointError(f"{self._file}: a list of {count:,} values; at most {MOST_VALUES:,} are read")
        if kind == _STRING:
            self._check(8 * count)
            return [self.text() for _ in range(count)]
        if kind not in _NUMBERS:
            raise CheckpointError(f"{self._file}: a list of type {kind} is not read")
        self._check(count)
        return list(self.numbers(f"{count}{_NUMBERS[kind]}"))

    def tensor(self) -> Tensor:
        name = self.text()
        if refused := refused_name(name):
            raise CheckpointError(f"{self._file}: {refused}")
        (dimensions,) = self.numbers("I")
        if dimensions > MOST_DIMENSIONS:
            raise CheckpointError(f"{self._file}: tensor {name}: {dimensions} dimensions")
        shape = self.numbers(f"{dimensions}Q")
        kind, offset = self.numbers("IQ")
        if max(offset, *shape, 0) >= _END:
            raise CheckpointError(f"{self._file}: tensor {name}: its dimensions or its place are beyond any file")
        return Tensor(name, self._file, shape[::-1], kind, offset)

    def _skip(self, size: int) -> int:
        self._check(size)
        begin, self.position = self.position, self.position + size
        return begin

    def _check(self, size: int) -> None:
        if self.position + size > LARGEST_HEADER:
            raise CheckpointError(f"{self._file}: its header goes on after {LARGEST_HEADER:,} bytes: it is damaged")
        if self.position + size > len(self._content):
            here = len(self._content)
            raise Truncated(f"{self._file}: truncated: its header goes on after the {here:,} bytes; get it again")


def _shortest(number: float) -> float:
    """What was meant by a float32: 1e-06, and not 9.999999974752427e-07."""
    for digits in range(6, 9):
        short = float(f"{number:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", number):
            return short
    return number


def numbers(header: Header, name: str, read: Bytes) -> list[float] | None:
    """The values of a small float32 tensor, rounded as facts are; None where there is none.

    Raises CheckpointError for one of another type or shape.
    """
    found = header.tensors.get(name)
    if found is None:
        return None
    if found.kind != 0 or len(found.shape) != 1 or found.shape[0] > 1 << 16:
        raise CheckpointError(
            f"{found.file}: tensor {name}: ggml's type {found.kind}, {list(found.shape)!r:.100}; expected a list of "
            "float32 (type 0)"
        )
    content = read(found.file, found.offset, 4 * found.shape[0])
    if len(content) < 4 * found.shape[0]:
        raise Truncated(f"{found.file}: truncated: tensor {name} lies beyond its end; get it again")
    return [_shortest(each) for each in struct.unpack(f"<{found.shape[0]}f", content)]
