"""`template: auto`: MLC's fields, worked out from what the tokenizer's own Jinja makes of known messages.

A Jinja template is a program; MLC's scheme is a list of texts. So the program is run on messages that are marks, its
output is cut at the marks, and the pieces are roles and separators. The result is then rendered beside the Jinja on
several conversations: a template that is not a list of texts shows there, and is refused with the difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlcbuild.chat.checkpoint import CheckpointChat
from mlcbuild.chat.compare import difference, end_of_turn, full_text
from mlcbuild.chat.conversation import Conversation, from_data, render
from mlcbuild.chat.jinja import DAY, ChatTemplate
from mlcbuild.chat.tokenizer_info import TokenizerFacts
from mlcbuild.errors import MlcBuildError

Messages = Sequence[Mapping[str, str]]

AUTO = "auto"  # the name of a template without fields of its own (mlcbuild.recipes.types.AUTO_TEMPLATE)

# Marks without spaces (templates trim) and without a part of another; none is a word that a template would know.
_SYSTEM = "qSYSTEMq"
_USERS = ("qUSERONEq", "qUSERTWOq", "qUSERTHREEq")
_REPLIES = ("qREPLYONEq", "qREPLYTWOq")
_MEANING = {
    _SYSTEM: "the system message",
    **dict(zip(_USERS, ("the first user message", "the second user message", "the third user message"), strict=True)),
    **dict(zip(_REPLIES, ("the first reply", "the second reply"), strict=True)),
}


@dataclass(frozen=True)
class Derived:
    """The template, and what of the Jinja it does not keep, in sentences."""

    conversation: Conversation
    notes: tuple[str, ...] = ()


def derive(checkpoint: CheckpointChat) -> Derived:
    """Raises MlcBuildError, naming what differs, where MLC's scheme cannot express the checkpoint's chat template."""
    template, tokenizer = checkpoint.template, checkpoint.tokenizer
    if template is None:
        raise MlcBuildError(
            f"template {AUTO}: the checkpoint has no chat_template (in tokenizer_config.json or chat_template.jinja)\n"
            "Choose one of recipes/templates/, or write one there: what the model was trained with"
        )
    has_system = _takes_system(template)
    # head | system | first | user | middle | reply | again | user | last
    pieces = _cut(template, _messages(2, has_system), reply=True)
    bos_ids, head = _cut_bos(pieces[0], template, tokenizer)
    first, middle, again, last = pieces[1:] if has_system else [head, *pieces[1:]]
    user_sep = _common_start(middle, last, _tail(template, _messages(1, has_system)))
    assistant_sep, named = _split_turn(again, first, _tail(template, _messages(1, has_system, replied=True)))
    user = again.removeprefix(assistant_sep)
    fields: dict[str, Any] = {
        **_roles(user, middle.removeprefix(user_sep), last.removeprefix(user_sep)),
        "seps": [user_sep] if user_sep == assistant_sep else [user_sep, assistant_sep],
        "system_prefix_token_ids": bos_ids,
        "add_role_after_system_message": named,
    }
    before = first.removesuffix(user) if named else first
    fields["system_template"] = head + "{system_message}" + before if has_system else before + "{system_message}"
    if has_system:
        fields["system_message"] = _default_system_message(template, tokenizer, head, first)
    fields["strip_reasoning_in_history"] = _strips_reasoning(template)
    fields |= _stops(again, tokenizer, checkpoint.end_ids)
    conversation = from_data(AUTO, fields)
    for messages in _probes(has_system, fields["strip_reasoning_in_history"]):
        _must_agree(conversation, template, tokenizer, messages)
    return Derived(conversation, tuple(_notes(conversation, template, tokenizer, has_system)))


def _messages(users: int, system: bool, replied: bool = False) -> Messages:
    """A conversation of marks that ends with the user's message number `users`, or with the reply to it."""
    turns = [{"role": "system", "content": _SYSTEM}] if system else []
    for i in range(users):
        turns.append({"role": "user", "content": _USERS[i]})
        if i < users - 1 or replied:
            turns.append({"role": "assistant", "content": _REPLIES[i]})
    return turns


def _takes_system(template: ChatTemplate) -> bool:
    """Templates of models without a system message refuse one, or leave it out."""
    try:
        return _SYSTEM in template.render(_messages(2, True))
    except MlcBuildError:
        return False


def _cut(template: ChatTemplate, messages: Messages, reply: bool) -> list[str]:
    """The rendered text cut at the messages: one piece more than there are messages."""
    text = template.render(messages, reply)
    marks = [message["content"] for message in messages]
    for mark in marks:
        if text.count(mark) != 1:
            did = "repeats" if mark in text else "leaves out"
            raise _inexpressible(template, f"it {did} {_MEANING[mark]}")
    for mark, following in itertools.pairwise(marks):
        if text.index(mark) > text.index(following):
            raise _inexpressible(template, f"it writes {_MEANING[mark]} after {_MEANING[following]}")
    pieces: list[str] = []
    for mark in marks:
        before, _, text = text.partition(mark)
        pieces.append(before)
    return [*pieces, text]


def _tail(template: ChatTemplate, messages: Messages) -> str:
    """What follows the last message when nothing is to be written."""
    return _cut(template, messages, reply=False)[-1]


def _cut_bos(text: str, template: ChatTemplate, tokenizer: TokenizerFacts) -> tuple[list[int] | None, str]:
    """The token that begins a text is given as an id; and the text without it."""
    bos = template.special.get("bos_token", "")
    if bos and text.startswith(bos) and bos in tokenizer.tokens:
        return [tokenizer.tokens[bos]], text.removeprefix(bos)
    return None, text


def _split_turn(again: str, first: str, end: str) -> tuple[str, bool]:
    """The separator at the beginning of `again` (reply -> user), and whether `first` ends with the rest, a role.

    `end` is what follows a reply that ends the conversation.
    """
    if end and again.startswith(end):
        return end, first.endswith(again.removeprefix(end))
    # Some templates end a reply only once another message follows: the role is then what both places have in common.
    role = _common_end(again, first)
    return again.removesuffix(role), bool(role) or not again


def _roles(user: str, reply: str, begin: str) -> dict[str, Any]:
    """Roles and what follows them, from what stands before a user's message, a reply, and a reply still to come."""
    shared = _common_end(user, reply)
    content_sep = shared[len(shared.rstrip(" \n\t:")) :]
    role = reply.removesuffix(content_sep)
    templates = {}
    if not begin.startswith(role):
        content_sep, role = "", _common_start(reply, begin)
    if not content_sep and role != reply:
        templates = {"assistant": reply.removeprefix(role) + "{assistant_message}"}
    roles = {"user": user.removesuffix(content_sep), "assistant": role}
    return {
        "roles": roles,
        "role_templates": templates,
        "role_content_sep": content_sep,
        "role_empty_sep": begin.removeprefix(role),
    }


def _default_system_message(template: ChatTemplate, tokenizer: TokenizerFacts, head: str, first: str) -> str:
    """What the template itself says where a conversation has no system message."""
    try:
        text = _cut_bos(_cut(template, _messages(1, False), reply=True)[0], template, tokenizer)[1]
    except MlcBuildError:  # a template may insist on one
        return ""
    fits = len(text) >= len(head) + len(first) and text.startswith(head) and text.endswith(first)
    return text[len(head) : len(text) - len(first)] if fits else ""


def _strips_reasoning(template: ChatTemplate) -> bool:
    """Whether earlier replies lose their reasoning, as in Qwen3."""
    try:
        return template.render(_with_reasoning()) == template.render(_messages(2, False))
    except MlcBuildError:
        return False


def _with_reasoning() -> Messages:
    reasoned = {"role": "assistant", "content": f"<think>\nqREASONq\n</think>\n\n{_REPLIES[0]}"}
    return [reasoned if message["role"] == "assistant" else message for message in _messages(2, False)]


def _stops(again: str, tokenizer: TokenizerFacts, end_ids: Sequence[int]) -> dict[str, Any]:
    """The special token that ends a reply, or else the text before the next user message; and the ends of text."""
    turn_end = end_of_turn(again, tokenizer)
    ids = [*([tokenizer.tokens[turn_end]] if turn_end else []), *end_ids]
    text = turn_end or again.rstrip()
    return {"stop_token_ids": list(dict.fromkeys(ids)), "stop_str": [text] if text else []}


def _probes(has_system: bool, strips_reasoning: bool) -> Iterator[Messages]:
    for users in (1, 2, 3):
        yield _messages(users, has_system)
    if strips_reasoning and not has_system:
        yield _with_reasoning()


def _must_agree(
    conversation: Conversation, template: ChatTemplate, tokenizer: TokenizerFacts, messages: Messages
) -> None:
    ours, theirs = full_text(render(conversation, messages), tokenizer), template.render(messages)
    if ours != theirs:
        found = difference(theirs, ours, template.origin, "as MLC would write it")
        raise _inexpressible(template, f"it treats messages by what is around them\n{found}")


def _notes(
    conversation: Conversation, template: ChatTemplate, tokenizer: TokenizerFacts, has_system: bool
) -> Iterator[str]:
    if template.asks_for_the_day:
        yield f"the chat template writes the day; the package always says {DAY:%d %B %Y}"
    if not has_system:
        yield "the chat template has no place for a system message; one would stand before the first message, as it is"
        return
    messages = _messages(1, False)
    try:
        same = full_text(render(conversation, messages), tokenizer) == template.render(messages)
    except MlcBuildError:
        return
    if not same:
        yield "without a system message the chat template leaves its frame out; MLC's runtimes write it, empty"


def _inexpressible(template: ChatTemplate, reason: str) -> MlcBuildError:
    return MlcBuildError(
        f"template {AUTO}: the chat template of {template.origin} cannot be written as an MLC template: {reason}\n"
        "Choose one of recipes/templates/, or write one there that comes close"
    )


def _common_start(*texts: str) -> str:
    shortest = min(texts, key=len)
    different = (i for i, letter in enumerate(shortest) if any(text[i] != letter for text in texts))
    return shortest[: next(different, len(shortest))]


def _common_end(*texts: str) -> str:
    return _common_start(*(text[::-1] for text in texts))[::-1]
