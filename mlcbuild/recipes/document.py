"""One YAML file, read and checked under the schema of its kind; and the memory of which contents were valid before."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.recipes import syntax
from mlcbuild.recipes.files import File, unreadable, write_atomically
from mlcbuild.recipes.problems import Problem
from mlcbuild.recipes.schemas import Schemas
from mlcbuild.regular import read_regular

if TYPE_CHECKING:
    import yaml

_FORMAT = "mlcbuild memo 1"  # raise the number when `syntax` reads the same text differently


@dataclass(frozen=True)
class Document:
    """A file that is valid YAML and valid under the schema of its kind."""

    file: File
    raw: bytes
    data: Any

    def problem(self, text: str, path: Sequence[str | int] = (), key: bool = False) -> Problem:
        """`text` about the value at `path`, or with `key` about its key."""
        return _problem(self.file, self._lines, text, syntax.locate(self._node, path, key))

    # The text is parsed again only for the position of a problem, so that reading a file without one stays fast.
    @cached_property
    def _node(self) -> yaml.Node:
        return syntax.compose(syntax.decode(self.raw))

    @cached_property
    def _lines(self) -> list[str]:
        return _lines(syntax.decode(self.raw))


class Memo:
    """Contents of valid files by the digest of their text, so that a build that changes nothing neither parses nor
    validates. A memo that is missing or damaged is an empty one.

    The file's first line is the digest of the rest, so that a damaged memo is never believed.
    """

    def __init__(self, path: Path | None, schemas: str) -> None:
        """`schemas`: digest of what the contents are valid under."""
        self._path = path
        self._head = f"{_FORMAT} {schemas}"
        self._known = self._read()
        self._used: dict[str, Any] = {}

    def get(self, kind: str, raw: bytes) -> Any:
        """The content of a file of `kind` with these bytes; None if it is not known to be valid."""
        key = _key(kind, raw)
        if key in self._known:
            self._used[key] = self._known[key]
        return self._known.get(key)

    def put(self, kind: str, raw: bytes, data: Any) -> None:
        self._used[_key(kind, raw)] = data

    def save(self) -> None:
        """Writes what was used, if that is not what was read. A memo that cannot be written is let be."""
        if self._path is None or self._used.keys() == self._known.keys():
            return
        body = json.dumps(self._used, separators=(",", ":"))
        with contextlib.suppress(OSError):
            write_atomically(self._path, f"{self._seal(body)}\n{body}")

    def _read(self) -> dict[str, Any]:
        if self._path is None:
            return {}
        try:
            seal, _, body = read_regular(self._path).decode("utf-8").partition("\n")
        except (OSError, UnicodeDecodeError):
            return {}
        known: dict[str, Any] = json.loads(body) if seal == self._seal(body) else {}
        return known

    def _seal(self, body: str) -> str:
        return hashlib.sha256(f"{self._head}\n{body}".encode()).hexdigest()


def read(file: File, schemas: Schemas, memo: Memo) -> tuple[Document | None, list[Problem]]:
    """The document, or everything that is wrong with the file as such. Names of other files are not looked up."""
    try:
        raw = read_regular(file.path)
    except OSError as error:
        return None, [unreadable(file.shown, error)]
    data = memo.get(file.kind, raw)
    if data is not None:
        return Document(file, raw, data), []
    lines: list[str] = []
    try:
        text = syntax.decode(raw)
        lines = _lines(text)
        node = syntax.compose(text)
        data, faults = syntax.construct(node)
    except syntax.Fault as fault:
        return None, [_problem(file, lines, fault.text, fault.span)]
    problems = [_problem(file, lines, fault.text, fault.span) for fault in faults]
    for complaint in schemas.complaints(file.kind, data):
        span = syntax.locate(node, complaint.path, complaint.key)
        problems.append(_problem(file, lines, complaint.text, span))
    if problems:
        return None, problems
    memo.put(file.kind, raw, data)
    return Document(file, raw, data), []


def _key(kind: str, raw: bytes) -> str:
    return hashlib.sha256(kind.encode() + b"\0" + raw).hexdigest()


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _problem(file: File, lines: Sequence[str], text: str, span: syntax.Span) -> Problem:
    source = lines[span.line - 1] if span.line <= len(lines) else ""
    return Problem(file.shown, span.line, span.column, text, source, span.length)
