"""The header of one safetensors file, read strictly.

Format (huggingface/safetensors README): 8 bytes, the header's length N as a little-endian integer; N bytes of JSON,
`{"name": {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, ..., "__metadata__": {text: text}}`, possibly
padded with spaces; then the tensors' bytes, row-major, little-endian, without gaps. Nothing but the header is read.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from mlcbuild.errors import POINTER, CheckpointError, pointer

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MOST_TENSORS = 500_000  # of a file; mixtures of hundreds of experts have fewer than 100,000
MOST_DIMENSIONS = 32
LONGEST_TENSOR_NAME = 1000  # characters
_END = 1 << 63  # of numbers: no file has so many bytes
NAMED = 12  # problems of a file that are told one by one

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class TensorRef:
    """A tensor inside a checkpoint file.

    `file` is the name in the checkpoint, `blob` the sha256 of that file's content ("" when it is not known), `path`
    where the content lies; `offset` counts from the start of the file; `dtype` is the format's name, such as BF16.
    `strides` (in elements) are given where the tensor is not row-major, as PyTorch's own files may have it: such a
    tensor is made anew before it is used (mlcbuild.checkpoints.computed).
    """

    name: str
    file: str
    blob: str
    path: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None


def read_header(path: Path, file: str, blob: str = "") -> list[TensorRef]:
    """The tensors of one file, in the order of their bytes.

    Raises CheckpointError, naming `file` and the tensor, for everything that is wrong with it: too short for its
    header, a header that is not such JSON, an unknown dtype, a size that does not fit the shape, bytes that overlap,
    leave a gap or lie outside the file, data missing at the end or left over, a tensor name that climbs.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8:
            raise CheckpointError(f"{file}: truncated: {size} bytes, too short for a safetensors header")
        if prefix == POINTER[:8]:
            raise CheckpointError(pointer(file))
        if length > MAX_HEADER:
            raise CheckpointError(f"{file}: not a safetensors file: it claims a header of {length} bytes")
        if 8 + length > size:
            raise CheckpointError(
                f"{file}: truncated: its header alone is {length} bytes, the file has {size}; get it again"
            )
        text = stream.read(length)
    header = _parse(text, file)
    problems: list[str] = []
    refs = []
    for name, entry in header.items():
        ref = _entry(name, entry, file, blob, path, 8 + length, problems)
        if ref is not None:
            refs.append(ref)
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    if not problems:
        problems = _layout_problems(refs, 8 + length, size, file)
    if problems:
        raise CheckpointError(first_of(problems))
    return refs


def first_of(problems: list[str]) -> str:
    """The problems of a file, a line each: the first of them, and how many there are beside."""
    more = len(problems) - NAMED
    return "\n".join([*problems[:NAMED], *([f"and {more} more of this kind"] if more > 0 else [])])


def is_number(value: object) -> bool:
    """Whether it can be a size, an offset or a stride."""
    return type(value) is int and 0 <= value < _END


def climbs(name: str) -> bool:
    """Whether a tensor or file name, taken as a path, could leave its folder, or is no text that can be written."""
    odd = "\\" in name or any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in name)
    return odd or not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts


def _parse(text: bytes, file: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise CheckpointError(f"{file}: {twice!r:.200} occurs twice in the header")
        return made

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file}: not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    if len(header) > MOST_TENSORS:
        raise CheckpointError(f"{file}: {len(header):,} tensors in one file; at most {MOST_TENSORS:,} are read")
    return header


def _entry(
    name: str, entry: Any, file: str, blob: str, path: Path, start: int, problems: list[str]
) -> TensorRef | None:
    where = f"{file}: tensor {name}"
    if refused := refused_name(name):
        problems.append(f"{file}: {refused}")
        return None
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(dtype, str) or len(shape) > MOST_DIMENSIONS or not all(map(is_number, numbers)):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        problems.append(
            f"{where}: its header entry is not {{dtype, shape, data_offsets: [begin, end]}}: {_shown(entry)}"
        )
        return None
    if dtype not in BITS:
        problems.append(f"{where}: unknown dtype {dtype!r:.40}; known are {', '.join(sorted(BITS))}")
        return None
    bits = prod(shape) * BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        problems.append(
            f"{where}: {dtype} {list(shape)} takes {_bytes(bits)} bytes, but its data_offsets "
            f"[{begin}, {end}] hold {end - begin}"
        )
        return None
    return TensorRef(name, file, blob, path, start + begin, end - begin, dtype, shape)


def refused_name(name: str) -> str | None:
    """What is said of a tensor's name that is not read."""
    if len(name) > LONGEST_TENSOR_NAME:
        return (
            f"tensor name {name!r:.60}… is refused: it has {len(name):,} characters, of at most {LONGEST_TENSOR_NAME}"
        )
    return f"tensor name {name!r} is refused: as a path it would climb out of its folder" if climbs(name) else None


def _shown(entry: Any) -> str:
    try:
        return f"{entry!r:.120}"
    except RecursionError:
        return f"a {type(entry).__name__} of many in each other"


def _bytes(bits: int) -> str:
    return f"{bits / 8:g}" if bits < _END else "more than 2^60"


def _layout_problems(refs: list[TensorRef], start: int, size: int, file: str) -> list[str]:
    problems = []
    position = start
    for ref in refs:
        if ref.offset != position:
            what = "overlaps the tensor before it" if ref.offset < position else "leaves a gap before it"
            problems.append(f"{file}: tensor {ref.name}: its data {what} (byte {ref.offset}, expected {position})")
        position = max(position, ref.offset + ref.nbytes)
    if problems:
        return problems
    if position > size:
        cut = next(ref for ref in refs if ref.offset + ref.nbytes > size)
        problems.append(
            f"{file}: truncated: tensor {cut.name} ends at byte {cut.offset + cut.nbytes}, the file has {size} "
            f"(it should have {position}); get it again"
        )
    elif position < size:
        problems.append(f"{file}: {size - position} bytes follow the last tensor; a safetensors file has none")
    return problems
