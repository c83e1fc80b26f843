"""Functions that a model may call: how it is told of them, and its calls read out of what it writes.

The checkpoint's own Jinja template writes tools and calls into the prompt; MLC's templates have no place for them. What
a model writes back is its family's habit, which the template's text gives away:

- `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, several if need be: Hermes, Qwen;
- `{"name": …, "parameters": {…}}` as the whole answer: Llama 3.1 and after.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlcbuild.chat.jinja import ChatTemplate
from mlcbuild.errors import MlcBuildError

if TYPE_CHECKING:
    from mlcbuild.serve.protocol import ChatMessage, Tool

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def prompt(template: ChatTemplate | None, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> str:
    """The text of a conversation with tools, up to where the assistant is to write.

    Raises MlcBuildError where the package's template knows no tools, and where it refuses these messages.
    """
    if template is None or "tools" not in template.source or not _form(template):
        raise MlcBuildError("tools: the chat template of this package's checkpoint has no place for them that is known")
    return template.with_tools([_for_template(message) for message in messages], [tool.model_dump() for tool in tools])


def reader(template: ChatTemplate) -> Calls:
    """What reads the calls out of one answer."""
    return Calls(_form(template) == "tags")


def _form(template: ChatTemplate) -> str | None:
    if _OPEN in template.source:
        return "tags"
    return "object" if '"parameters"' in template.source else None


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
    """The answer of one choice, read as it comes. `tags`: calls stand between tags, else a call is the whole answer."""

    tags: bool
    made: int = 0  # calls so far
    _waiting: str = ""  # what may be a call, or the beginning of one
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
            end = self._waiting.find(_CLOSE, start)
            yield from self._said(self._taken(start))
            if end < 0:
                return
            whole = self._taken(end - start + len(_CLOSE))
            yield from self._call(whole.removeprefix(_OPEN).removesuffix(_CLOSE), whole)
        held = next((n for n in range(len(_OPEN) - 1, 0, -1) if self._waiting.endswith(_OPEN[:n])), 0)
        yield from self._said(self._taken(len(self._waiting) - held))

    def end(self) -> Iterator[dict[str, Any]]:
        """What is left when the text is complete. A call that a model did not close is one if it can be read."""
        whole = self._taken(len(self._waiting))
        if whole.lstrip().startswith(_OPEN if self.tags else "{"):
            yield from self._call(whole.lstrip().removeprefix(_OPEN), whole)
        else:
            yield from self._said(whole)

    def _taken(self, count: int) -> str:
        text, self._waiting = self._waiting[:count], self._waiting[count:]
        return text

    def _said(self, text: str) -> Iterator[dict[str, Any]]:
        """Blanks around calls are layout."""
        if text.strip() or (text and not self.made):
            yield {"content": text}

    def _call(self, inside: str, whole: str) -> Iterator[dict[str, Any]]:
        """What cannot be read as a call is text, and the client sees it."""
        found = _parsed(inside)
        if found is None:
            yield from self._said(whole)
            return
        function = {"name": found["name"], "arguments": json.dumps(_arguments(found), ensure_ascii=False)}
        call = {"index": self.made, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        self.made += 1
        yield {"tool_calls": [call]}


def _parsed(text: str) -> Mapping[str, Any] | None:
    try:
        found = json.loads(text.strip())
    except (ValueError, RecursionError):
        return None
    named = isinstance(found, dict) and isinstance(found.get("name"), str)
    return found if named and isinstance(_arguments(found), dict) else None


def _arguments(call: Mapping[str, Any]) -> Any:
    return call.get("arguments", call.get("parameters", {}))
