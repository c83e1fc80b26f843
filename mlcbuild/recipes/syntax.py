"""YAML text to plain data, strictly.

The parser is libyaml's; what scalars mean is YAML 1.2's core schema, because 1.1 reads `no` as false, `1e-3` as text
and `12:30` as a number of seconds. Keys are always text. A repeated key, which YAML readers take the last of in
silence, is a fault.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

_NULL = ("", "~", "null", "Null", "NULL")
_BOOLEAN = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_MOST_ALIASED = 100_000  # values that aliases repeat: ten aliases in each of ten lists are 10^10
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))


@dataclass(frozen=True)
class Span:
    """A piece of one line; both numbers count from 1, in characters."""

    line: int = 1
    column: int = 1
    length: int = 1


class Fault(Exception):
    """Text that is not YAML, or not YAML as it is accepted here."""

    def __init__(self, text: str, span: Span) -> None:
        super().__init__(text)
        self.text = text
        self.span = span


def decode(raw: bytes) -> str:
    """Raises Fault where the bytes are not UTF-8. A byte order mark is dropped."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        good = raw[: error.start].decode("utf-8-sig", errors="ignore")
        text = f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise Fault(text, _span_at(good, len(good))) from None


def compose(text: str) -> yaml.Node:
    """The node tree of a file with one document. Raises Fault for a syntax error and for an empty file."""
    import yaml

    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        span = Span(mark.line + 1, mark.column + 1) if mark else Span()
        raise _no_break_space(text, span) or Fault(f"not valid YAML: {_explain(error, text, span)}", span) from None
    except yaml.reader.ReaderError as error:
        raise Fault(f"not valid YAML: character U+{_code(error):04X} is not allowed", _unprintable(text)) from None
    if node is None:
        raise Fault("the file is empty", Span())
    return node


def construct(root: yaml.Node) -> tuple[Any, list[Fault]]:
    """The tree as dict, list, str, int, float, bool and None, and what had to be passed over to get there.

    Raises Fault where aliases repeat more than any file needs.
    """
    construction = _Construction()
    try:
        return construction.data(root), construction.faults
    except RecursionError:
        return None, [Fault("nested too deeply", Span())]


def locate(root: yaml.Node, path: Sequence[str | int], key: bool = False) -> Span:
    """Where the value at `path` stands, or with `key` its key; the nearest thing around it if it is not there."""
    node: Any = root
    for depth, part in enumerate(path):
        found = None
        if node.id == "sequence" and isinstance(part, int) and part < len(node.value):
            found = node.value[part]
        elif node.id == "mapping":
            name, value = _entries(node).get(part, (None, None))
            found = name if key and depth == len(path) - 1 else value
        if found is None:
            break
        node = found
    return _span(node)


class _Construction:
    """Nodes as plain data; an alias is the data of what it refers to, once more."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self._open: set[int] = set()  # nodes that are being made
        self._made: set[int] = set()
        self._aliased = 0

    def data(self, node: Any) -> Any:
        """The data of a node."""
        if id(node) in self._made:
            self._aliased += 1
            if self._aliased > _MOST_ALIASED:
                raise Fault(f"aliases repeat more than {_MOST_ALIASED:,} values; write it out shorter", _span(node))
        self._made.add(id(node))
        if node.tag not in _TAGS:
            text = f"tag `{node.tag.replace('tag:yaml.org,2002:', '!!')}` is not supported"
            self.faults.append(Fault(text, _span(node)))
        if node.id == "scalar":
            return node.value if node.style else _plain(node.value)
        if id(node) in self._open:
            self.faults.append(Fault("an alias stands inside what it refers to", _span(node)))
            return None
        self._open.add(id(node))
        data = [self.data(item) for item in node.value] if node.id == "sequence" else self._mapping(node)
        self._open.discard(id(node))
        return data

    def _mapping(self, node: Any) -> dict[str, Any]:
        data: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.id != "scalar":
                self.faults.append(Fault("a key must be text, not a list or a mapping", _span(key)))
                continue
            if key.value in data:
                text = f"key `{key.value}` is repeated: it stands on line {lines[key.value]} too; remove one of them"
                self.faults.append(Fault(text, _span(key)))
            lines[key.value] = key.start_mark.line + 1
            data[key.value] = self.data(value)
        return data


def _plain(text: str) -> str | int | float | bool | None:
    if text in _NULL:
        return None
    if text in _BOOLEAN:
        return _BOOLEAN[text]
    if _NUMBER.fullmatch(text):
        number = float(text)
        if math.isfinite(number):  # a number beyond that stays text, which no schema takes for a number
            return int(text) if text.lstrip("+-").isdecimal() else number
    return text


@functools.lru_cache(maxsize=8)  # of thousands of problems in one mapping, each asks for the same one
def _entries(node: yaml.MappingNode) -> dict[Any, tuple[Any, Any]]:
    return {name.value: (name, value) for name, value in node.value if name.id == "scalar"}


def _span(node: Any) -> Span:
    start, end = node.start_mark, node.end_mark
    # A value of several lines is pointed at where it begins.
    length = end.column - start.column if end.line == start.line else 1
    return Span(start.line + 1, start.column + 1, max(1, length))


def _span_at(text: str, index: int) -> Span:
    before = text[:index]
    return Span(before.count("\n") + 1, index - (before.rfind("\n") + 1) + 1)


@functools.cache
def _loader() -> Any:
    import yaml

    # The pure Python parser is the same, slower, where PyYAML was built without libyaml.
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (every scalar stays text: _plain reads it)

    return Loader


def _no_break_space(text: str, span: Span) -> Fault | None:
    """The fault of a no-break space where YAML needs a space, which the parser meets later, if at all."""
    read = "".join(text.splitlines(keepends=True)[: span.line])
    match = re.search("^[ \xa0]*(\xa0)|[:-](\xa0)", read, re.MULTILINE)
    if match is None:
        return None
    return Fault(
        "a no-break space (U+00A0) is no space in YAML; write an ordinary one", _span_at(text, match.end() - 1)
    )


def _explain(error: yaml.MarkedYAMLError, text: str, span: Span) -> str:
    problem, context = error.problem or "", error.context or ""
    before = "".join(text.splitlines()[span.line - 1 : span.line])[: span.column]
    if "found a tab character" in problem or (before.isspace() and before.endswith("\t")):
        return "a tab is used for indentation; use spaces"
    if problem == "but found another document":
        return "a file holds one document, here a second one begins"
    if problem == "mapping values are not allowed in this context":
        return "a second `: ` on this line; put the text in quotes"
    if problem == "found character that cannot start any token":
        return "text cannot begin with this character; put it in quotes"
    if context and error.context_mark:
        return f"{problem} {context} that begins on line {error.context_mark.line + 1}"
    return problem


def _code(error: Any) -> int:
    character = error.character
    return character if isinstance(character, int) else ord(character[:1] or "\0")


def _unprintable(text: str) -> Span:
    # What YAML 1.2 (§5.1) does not count among its characters; the parser reports a byte offset only.
    match = re.search("[^\\t\\n\\r\\x20-\\x7e\\x85\\xa0-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]", text)
    return _span_at(text, match.start()) if match else Span()
