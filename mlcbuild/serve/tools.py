"""Functions that a model may call: how it is told of them, and its calls read out of what it writes.

The checkpoint's own Jinja template writes tools and calls into the prompt; MLC's templates have no place for them. What
a model writes back is its family's habit, which the template's text gives away:

- `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, several if need be: Hermes, Qwen;
- `{"name": …, "parameters": {…}}` as the whole answer: Llama 3.1 and after.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlcbuild.chat.jinja import ChatTemplate
from mlcbuild.errors import MlcBuildError

if TYPE_CHECKING:
    from mlcbuild.serve.protocol import ChatMessage, Tool

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_OTHER_FORMS = ("<arg_key>", "<function=")  # XML between the tags: GLM 4.5, Qwen3-Coder
DEEPEST, LARGEST = 32, 1 << 18  # of tools and arguments: how much in each other, characters of JSON; indented they grow


def prompt(template: ChatTemplate | None, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> str:
    """The text of a conversation with tools, up to where the assistant is to write.

    Raises MlcBuildError where the package's template knows no tools that can be read, and where it refuses these
    messages.
    """
    if template is None or "tools" not in template.source or not _form(template):
        raise MlcBuildError("tools: the chat template of this package's checkpoint has no place for them that is known")
    told = [tool.model_dump() for tool in tools]
    said = [_for_template(message) for message in messages]
    if _too_deep(told) or _too_deep(said):
        raise MlcBuildError(f"tools: more than {DEEPEST} levels in each other, in a schema or in arguments")
    if (size := len(json.dumps(told))) > LARGEST:
        raise MlcBuildError(f"tools: {size:,} characters as JSON; at most {LARGEST:,} are taken")
    return template.with_tools(said, told)


def reader(template: ChatTemplate, tools: Sequence[Tool], several: bool, forced: bool) -> Calls:
    """What reads the calls of these tools out of one answer; not `several`: the first alone counts."""
    return Calls(_form(template) == "tags", frozenset(tool.function.name for tool in tools), several, forced)


def grammar(template: ChatTemplate, tools: Sequence[Tool], several: bool) -> str:
    """What an answer must be that calls one of these tools, or `several` one after another, in llguidance's Lark.

    Arguments fit their tool's schema. Raises MlcBuildError for a schema whose values are no objects.
    """
    tags = _form(template) == "tags"
    begin, middle, end = (f"{_OPEN}\n", "arguments", f"\n{_CLOSE}") if tags else ("", "parameters", "")
    rules = [f"start: call {'(BETWEEN call)*' if tags and several else ''}"]
    rules += [f"call: {' | '.join(f'call{i}' for i in range(len(tools)))}", f"BETWEEN: {_text(chr(10))}"]
    for i, function in enumerate(tool.function for tool in tools):
        if function.parameters.get("type", "object") != "object":
            raise MlcBuildError(f"tools: the parameters of {function.name} must be of type object")
        head = f'{begin}{{"name": {_text(function.name)}, "{middle}": '
        # As the templates' own examples have it.
        style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        schema = {**function.parameters, "type": "object", "x-guidance": style}
        rules += [f"call{i}: {_text(head)} arguments{i} {_text('}' + end)}", f"arguments{i}: %json {_text(schema)}"]
    return "\n".join(rules)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _form(template: ChatTemplate) -> str | None:
    if any(other in template.source for other in _OTHER_FORMS):
        return None
    if _OPEN in template.source:
        return "tags"
    return "object" if '"parameters"' in template.source else None


def _too_deep(value: Any, levels: int = DEEPEST) -> bool:
    """Whether more than so many lists and objects are in each other."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_too_deep(each, levels - 1) for each in inner)


def _for_template(message: ChatMessage) -> dict[str, Any]:
    """As transformers' templates want it: arguments are a mapping, not its text."""
    found: dict[str, Any] = {**message.plain()}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.function.name, "arguments": c.function.values}}
            for c in message.tool_calls
        ]
    return found


@dataclass
class Calls:
    """The answer of one choice, read as it comes.

    `tags`: calls stand between tags, else a call is the whole answer. `names`: what may be called; JSON of another name
    is text. `forced`: the answer is nothing but calls (`grammar`), so a tag in the middle of one is in a text of it.
    """

    tags: bool
    names: frozenset[str]
    several: bool = True
    forced: bool = False
    made: int = 0  # calls so far
    _waiting: str = ""  # what may be a call, or the beginning of one
    _blanks: str = ""  # after a call: layout, unless more text follows
    _free: bool = False  # the answer has begun, and not as a call

    def feed(self, text: str) -> Iterator[dict[str, Any]]:
        """Deltas, as OpenAI's streams have them, of what is sure by now."""
        self._waiting += text
        if not self.tags:
            begun = self._waiting.lstrip()
            self._free |= bool(begun) and not begun.startswith("{")
            if self._free:
                yield from self._said(self._taken(len(self._waiting)))
            return
        while (start := self._waiting.find(_OPEN)) >= 0:
            yield from self._said(self._taken(start))
            end, call = self._closed()
            if not end:
                return
            yield from self._called(call, self._taken(end))
        held = next((n for n in range(len(_OPEN) - 1, 0, -1) if self._waiting.endswith(_OPEN[:n])), 0)
        yield from self._said(self._taken(len(self._waiting) - held))

    def end(self) -> Iterator[dict[str, Any]]:
        """What is left when the text is complete. A call that a model did not close is one if it can be read."""
        whole = self._taken(len(self._waiting))
        begun = whole.lstrip()
        if begun.startswith(_OPEN if self.tags else "{"):
            yield from self._called(self._parsed(begun.removeprefix(_OPEN) if self.tags else begun), whole)
        else:
            yield from self._said(whole)

    def _closed(self) -> tuple[int, Mapping[str, Any] | None]:
        """Where the call that begins here ends, and it; 0: that is not known yet.

        A closing tag may stand in a text of the arguments, so where what is before it cannot be read the next one is
        tried, as long as no other call has begun: where calls are not `forced`, that ends one that cannot be read.
        """
        other = -1 if self.forced else self._waiting.find(_OPEN, len(_OPEN))
        end = self._waiting.find(_CLOSE)
        first = end + len(_CLOSE) if end >= 0 else 0
        while end >= 0 and (other < 0 or end < other or end + len(_CLOSE) == first):
            call = self._parsed(self._waiting[len(_OPEN) : end])
            if call is not None:
                return end + len(_CLOSE), call
            end = self._waiting.find(_CLOSE, end + 1)
        return (first, None) if first and other >= 0 else (0, None)

    def _taken(self, count: int) -> str:
        text, self._waiting = self._waiting[:count], self._waiting[count:]
        return text

    def _said(self, text: str) -> Iterator[dict[str, Any]]:
        if self.made:
            text = self._blanks + text
            self._blanks = text[len(text.rstrip()) :]
            text = text.rstrip() if self.several else ""
        if text:
            yield {"content": text}

    def _called(self, call: Mapping[str, Any] | None, whole: str) -> Iterator[dict[str, Any]]:
        """What cannot be read as a call is text, and the client sees it."""
        if call is None:
            yield from self._said(whole)
        elif self.several or not self.made:
            identity = {"index": self.made, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
            self.made += 1
            self._blanks = ""
            yield {"tool_calls": [{**identity, "function": call}]}

    def _parsed(self, text: str) -> Mapping[str, Any] | None:
        """The name and the arguments, as JSON; numbers as they are written, however large."""
        mark = uuid.uuid4().hex
        try:
            found = json.loads(text.strip(), parse_float=mark.__add__, parse_int=mark.__add__)
            if not isinstance(found, dict) or found.get("name") not in self.names:
                return None
            arguments = found.get("arguments", found.get("parameters", {} if self.tags else None))
            if not isinstance(arguments, dict):
                return None
            written = json.dumps(arguments, allow_nan=False)
            return {"name": found["name"], "arguments": re.sub(f'"{mark}([^"]*)"', r"\1", written)}
        except (ValueError, TypeError, RecursionError):
            return None
