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
        raise Fault(f"not valid YAML: {_explain(error)}", span) from None
    except yaml.reader.ReaderError as error:
        raise Fault(f"not valid YAML: character U+{_code(error):04X} is not allowed", _unprintable(text)) from None
    if node is None:
        raise Fault("the file is empty", Span())
    return node


def construct(root: yaml.Node) -> tuple[Any, list[Fault]]:
    """The tree as dict, list, str, int, float, bool and None, and what had to be passed over to get there."""
    faults: list[Fault] = []
    try:
        return _construct(root, faults, set()), faults
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
            for name, value in node.value:
                if name.value == part:
                    found = name if key and depth == len(path) - 1 else value
        if found is None:
            break
        node = found
    return _span(node)


def _construct(node: Any, faults: list[Fault], open_nodes: set[int]) -> Any:
    if node.tag not in _TAGS:
        faults.append(Fault(f"tag `{node.tag.replace('tag:yaml.org,2002:', '!!')}` is not supported", _span(node)))
    if node.id == "scalar":
        return node.value if node.style else _plain(node.value)
    if id(node) in open_nodes:
        faults.append(Fault("an alias stands inside what it refers to", _span(node)))
        return None
    open_nodes.add(id(node))
    data: Any
    lines: dict[str, int] = {}
    if node.id == "sequence":
        data = [_construct(item, faults, open_nodes) for item in node.value]
    else:
        data = {}
        for key, value in node.value:
            if key.id != "scalar":
                faults.append(Fault("a key must be text, not a list or a mapping", _span(key)))
                continue
            if key.value in data:
                text = f"key `{key.value}` is repeated: it stands on line {lines[key.value]} too; remove one of them"
                faults.append(Fault(text, _span(key)))
            lines[key.value] = key.start_mark.line + 1
            data[key.value] = _construct(value, faults, open_nodes)
    open_nodes.discard(id(node))
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


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem, context = error.problem or "", error.context or ""
    if "found a tab character" in problem or problem.startswith("found character '\\t'"):
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
