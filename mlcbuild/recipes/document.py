"""One YAML file: its content, and where in its text each part of the content stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlcbuild.recipes import syntax
from mlcbuild.recipes.memo import Memo
from mlcbuild.recipes.problems import Problem
from mlcbuild.recipes.schemas import Schemas
from mlcbuild.recipes.workspace import File

if TYPE_CHECKING:
    import yaml


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


def read(file: File, schemas: Schemas, memo: Memo) -> tuple[Document | None, list[Problem]]:
    """The document, or everything that is wrong with the file as such. Names of other files are not looked up."""
    try:
        raw = file.path.read_bytes()
    except OSError as error:
        return None, [Problem(file.shown, 1, 1, f"cannot be read: {error.strerror}")]
    data = memo.get(file.kind, raw)
    if data is not None:
        return Document(file, raw, data), []
    try:
        text = syntax.decode(raw)
    except syntax.Fault as fault:
        return None, [_problem(file, [], fault.text, fault.span)]
    lines = _lines(text)
    try:
        node = syntax.compose(text)
    except syntax.Fault as fault:
        return None, [_problem(file, lines, fault.text, fault.span)]
    data, faults = syntax.construct(node)
    problems = [_problem(file, lines, fault.text, fault.span) for fault in faults]
    for complaint in schemas.complaints(file.kind, data):
        span = syntax.locate(node, complaint.path, complaint.key)
        problems.append(_problem(file, lines, complaint.text, span))
    if problems:
        return None, problems
    memo.put(file.kind, raw, data)
    return Document(file, raw, data), []


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _problem(file: File, lines: Sequence[str], text: str, span: syntax.Span) -> Problem:
    source = lines[span.line - 1] if span.line <= len(lines) else ""
    return Problem(file.shown, span.line, span.column, text, source, span.length)
