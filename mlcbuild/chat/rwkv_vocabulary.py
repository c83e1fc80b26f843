"""The vocabulary of RWKV's "world" models: tokens are byte strings, the longest that fits is taken.

Checkpoints have it as `rwkv_vocab_vYYYYMMDD.txt`, a line per token: its id, a Python literal of its text or bytes, its
length in bytes. MLC's runtimes read `tokenizer_model`: the same as a MessagePack map from id to bytes. Id 0, which no
line has, ends a text.
"""

from __future__ import annotations

import ast
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from mlcbuild.errors import MlcBuildError

SOURCE = re.compile(r"rwkv_vocab_v\d{8}\.txt")
FILE = "tokenizer_model"
END, END_TEXT = 0, "<|endoftext|>"

Vocabulary = Mapping[int, bytes]


def text_of(token: bytes) -> str:
    """A text for each token, and another one for another token: bytes that are no UTF-8 become lone surrogates."""
    return token.decode("utf-8", "surrogateescape")


def read_source(path: Path) -> dict[int, bytes]:
    """The vocabulary file of a checkpoint. Raises MlcBuildError naming the first line that is not of its form."""
    vocabulary: dict[int, bytes] = {}
    # Tokens hold characters that some readers take for line ends, so only "\n" ends a line.
    for number, line in enumerate(path.read_bytes().decode("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            first, _, rest = line.strip().partition(" ")
            literal, _, length = rest.rpartition(" ")
            value = ast.literal_eval(literal.strip())
            token = value.encode() if isinstance(value, str) else value
            fits = isinstance(token, bytes) and len(token) == int(length) and int(first) not in vocabulary
        except (ValueError, SyntaxError):
            fits = False
        if not fits:
            raise MlcBuildError(f"{path.name}: line {number} is not `id literal length` of a new token: {line[:60]!r}")
        vocabulary[int(first)] = token
    return vocabulary


def pack(vocabulary: Vocabulary) -> bytes:
    """MessagePack (msgpack.org): a map from unsigned integers to binary strings, in the given order."""
    out = [struct.pack(">BI", 0xDF, len(vocabulary))]
    for token_id, token in vocabulary.items():
        out.append(_integer(token_id))
        short = len(token) < 1 << 8
        out += [struct.pack(">BB" if short else ">BH", 0xC4 if short else 0xC5, len(token)), token]
    return b"".join(out)


def write_packed(files: Mapping[str, Path], folder: Path) -> list[str]:
    """Write `tokenizer_model` where a checkpoint's files have nothing but a vocabulary; the files that came of it."""
    sources = [name for name in sorted(files) if SOURCE.fullmatch(name)]
    if not sources or any(name in files for name in ("tokenizer.json", "tokenizer.model", FILE)):
        return []
    (folder / FILE).write_bytes(pack(read_source(files[sources[-1]])))
    return [FILE]


def read(path: Path) -> dict[int, bytes]:
    """A `tokenizer_model`. Raises MlcBuildError for a file that is not such a map."""
    data, at = path.read_bytes(), 0

    def take(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return int(value)

    def integer() -> int:
        tag = take(">B")
        return tag if tag < 0x80 else take(_INTEGERS[tag])

    def string() -> bytes:
        nonlocal at
        tag = take(">B")
        length = tag & 0x1F if tag & 0xE0 == 0xA0 else take(_STRINGS[tag])
        at += length
        return data[at - length : at]

    try:
        tag = take(">B")
        count = tag & 0x0F if tag & 0xF0 == 0x80 else take(_MAPS[tag])
        found = {integer(): string() for _ in range(count)}
        if at != len(data) or not found:
            raise ValueError("bytes are left")
    except (KeyError, ValueError, struct.error):
        raise MlcBuildError(f"{path}: not a vocabulary of RWKV: expected a MessagePack map from ids to bytes") from None
    return found


_INTEGERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
_STRINGS = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_MAPS = {0xDE: ">H", 0xDF: ">I"}


def _integer(value: int) -> bytes:
    if value < 0x80:
        return struct.pack(">B", value)
    tag = 0xCC if value < 1 << 8 else 0xCD if value < 1 << 16 else 0xCE
    return struct.pack(">B", tag) + struct.pack(_INTEGERS[tag], value)
