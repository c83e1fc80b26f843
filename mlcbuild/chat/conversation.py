"""A conversation template, as MLC's `conv_template`, and a conversation rendered with it.

Fields, defaults and rendering are those of MLC LLM (python/mlc_llm/protocol/conversation_protocol.py, July 2026), so
that what is rendered here is what its engine, WebLLM and the apps feed to the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlcbuild.errors import MlcBuildError

_PLACEHOLDERS = {"user": "{user_message}", "assistant": "{assistant_message}", "tool": "{tool_message}"}
_SYSTEM, _FUNCTION = "{system_message}", "{function_string}"
_REASONING_END = "</think>"


@dataclass(frozen=True)
class Conversation:
    """The fields of `conv_template`, in its order; a template file says those that differ from the defaults."""

    name: str
    system_template: str = _SYSTEM
    system_message: str = ""
    system_prefix_token_ids: Sequence[int] | None = None  # put before the tokenized prompt
    add_role_after_system_message: bool = True  # False: the first user role is part of the system template
    roles: Mapping[str, str] = field(default_factory=dict)
    role_templates: Mapping[str, str] = field(default_factory=dict)
    messages: Sequence[Sequence[str]] = ()  # example turns that every conversation begins with: [role, content]
    seps: Sequence[str] = ("",)  # after every message; or two: after the user's, after the assistant's
    role_content_sep: str = ""
    role_empty_sep: str = ""  # between the assistant's role and what the model is to write
    stop_str: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    strip_reasoning_in_history: bool = False
    function_string: str = ""
    use_function_calling: bool = False

    def to_json(self) -> dict[str, Any]:
        """`conv_template` of mlc-chat-config.json: every field, in MLC's order."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation: ids that are not text, then text to be tokenized without special tokens of its own."""

    prefix_token_ids: tuple[int, ...]
    text: str


def from_data(name: str, data: Mapping[str, Any]) -> Conversation:
    """The conversation template that a template file, or a published `conv_template`, describes.

    Raises MlcBuildError for an unknown field, a missing role and a wrong number of separators.
    """
    known = {f.name for f in dataclasses.fields(Conversation)}
    # `description` and the like are the file's own; MLC's older configs say `offset` and `separator_style`.
    fields = {key: value for key, value in data.items() if key in known and value is not None}
    fields["name"] = name
    fields["role_templates"] = {**_PLACEHOLDERS, **data.get("role_templates", {})}
    conversation = Conversation(**fields)
    if not {"user", "assistant"} <= conversation.roles.keys():
        raise MlcBuildError(f"template {name}: `roles` must name user and assistant; it has {list(conversation.roles)}")
    if len(conversation.seps) not in (1, 2):
        raise MlcBuildError(f"template {name}: `seps` has {len(conversation.seps)} entries, expected 1 or 2")
    return conversation


def render(conversation: Conversation, messages: Sequence[Mapping[str, str]], reply: bool = True) -> Prompt:
    """`messages` ({"role": ..., "content": ...}) as one prompt; with `reply`, up to where the assistant is to write.

    A message of the role `system` replaces the template's system message. Raises MlcBuildError for another role that
    the template has no name for.
    """
    system_message = conversation.system_message
    turns = [(role, content) for role, content in conversation.messages]
    for message in messages:
        if message["role"] == "system":
            system_message = message["content"]
        else:
            turns.append((message["role"], message["content"]))
    if conversation.strip_reasoning_in_history:
        turns = _strip_reasoning(turns)
    system = conversation.system_template.replace(_SYSTEM, system_message)
    parts = [system]
    for i, (role, content) in enumerate(turns):
        named = i > 0 or not system or conversation.add_role_after_system_message
        parts.append(_turn(conversation, role, content, named))
    if reply:
        parts.append(conversation.roles["assistant"] + conversation.role_empty_sep)
    text = _insert_functions("".join(parts), conversation.function_string)
    return Prompt(tuple(conversation.system_prefix_token_ids or ()), text)


def _turn(conversation: Conversation, role: str, content: str, named: bool) -> str:
    if role not in conversation.roles:
        raise MlcBuildError(
            f"template {conversation.name}: no role `{role}`; there are {', '.join(conversation.roles)} and system"
        )
    name = conversation.roles[role] + conversation.role_content_sep if named else ""
    body = conversation.role_templates.get(role, "").replace(_PLACEHOLDERS.get(role, ""), content)
    return name + body + conversation.seps[-1 if role == "assistant" else 0]


def _insert_functions(text: str, functions: str) -> str:
    """The last placeholder becomes the functions; others go."""
    head, found, tail = text.rpartition(_FUNCTION)
    return head.replace(_FUNCTION, "") + functions + tail if found else text


def _strip_reasoning(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without the reasoning of replies before the user's last message, as Qwen3's own template renders history."""
    last_user = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=-1)
    return [
        (role, content.split(_REASONING_END)[-1].lstrip("\n") if role == "assistant" and i < last_user else content)
        for i, (role, content) in enumerate(turns)
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
