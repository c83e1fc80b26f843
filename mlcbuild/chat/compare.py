"""A package's conversation template beside the checkpoint's own: the same conversation, rendered both ways."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.chat.checkpoint import CheckpointChat, read_checkpoint_chat
from mlcbuild.chat.conversation import Conversation, Prompt, render
from mlcbuild.chat.jinja import ChatTemplate
from mlcbuild.chat.tokenizer_info import TokenizerFacts, marks, unknown_stops
from mlcbuild.errors import MlcBuildError

_SYSTEM = {"role": "system", "content": "Answer in one sentence."}
_TURNS = (
    {"role": "user", "content": "What is a star?"},
    {"role": "assistant", "content": "A ball of hot gas."},
    {"role": "user", "content": "And a planet?"},
)
_THIRD = ({"role": "assistant", "content": "A ball of rock."}, {"role": "user", "content": "What is a moon?"})
# The commonest conversation first; all go up to where the assistant is to write.
_WITHOUT = ("one turn", "two turns", "three turns")
FULLEST = "system message, two turns"
CONVERSATIONS: Mapping[str, Sequence[Mapping[str, str]]] = {
    "one turn": _TURNS[:1],
    "two turns": _TURNS,
    "three turns": (*_TURNS, *_THIRD),
    "system message, one turn": (_SYSTEM, *_TURNS[:1]),
    FULLEST: (_SYSTEM, *_TURNS),
}


@dataclass(frozen=True)
class TemplateReport:
    """`report` is what quality.json says under `template`; `warnings` are its differences in a sentence each."""

    report: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    lacks: bool = False  # marks such as <|im_start|> that the checkpoint writes


def check(conversation: Conversation, folder: Path) -> tuple[TemplateReport, list[str]]:
    """A package's template beside what the files in its weights folder say; and what is wrong with its stop tokens."""
    checkpoint = read_checkpoint_chat({path.name: path for path in folder.iterdir()})
    if checkpoint is None:
        return TemplateReport({"checked": False, "reason": "there is no tokenizer"}), []
    return compare(conversation, checkpoint), stop_problems(conversation, checkpoint.tokenizer)


def compare(conversation: Conversation, checkpoint: CheckpointChat) -> TemplateReport:
    """The template against the checkpoint's Jinja.

    `report`: `checked` (with a `reason` where it is not), `differs_in` (those of CONVERSATIONS that are not the same),
    `differs` (a diff of one with a system message), `differs_by_default` (of one without, where each has its own
    default),
    `stop_tokens` (where the template does not stop at all tokens that end the checkpoint's texts).
    """
    template, tokenizer = checkpoint.template, checkpoint.tokenizer
    if template is None:
        return TemplateReport({"checked": False, "reason": "the checkpoint has no chat_template"})
    report: dict[str, Any] = {"checked": True}
    warnings = []
    names = (f"{template.origin}: chat_template", f"template {conversation.name}")
    found: dict[str, str] = {}
    lacks = False
    try:
        texts = template.render(_TURNS)
        for name, messages in CONVERSATIONS.items():
            theirs = _rendered(template, messages)
            if theirs is not None:
                texts = theirs if name == FULLEST else texts
                ours = full_text(render(conversation, messages), tokenizer)
                found[name] = difference(theirs, ours, *names)
                lacks |= any(theirs.count(mark) > ours.count(mark) for mark in marks(theirs))
    except MlcBuildError as error:
        return TemplateReport({"checked": False, "reason": str(error)})
    without = [text for name, text in found.items() if text and name in _WITHOUT]
    others = [text for name, text in reversed(found.items()) if text and name not in _WITHOUT]
    if FULLEST not in found:  # a model without system messages
        without, others = [], [found[name] for name in reversed(_WITHOUT) if found[name]]
    if others:
        report["differs"] = others[0]
        warnings.append(f"it does not write conversations as {names[0]} does (quality.json has the difference)")
    if without and without[0] not in others:
        report["differs_by_default"] = without[0]
    if differs := [name for name, text in found.items() if text]:
        report["differs_in"] = differs
    stops, problem = _compare_stops(conversation, checkpoint, texts)
    if stops:
        report["stop_tokens"] = stops
    if problem:
        warnings.append(problem)
    said = tuple(f"template {conversation.name}: {warning}" for warning in warnings)
    return TemplateReport(report, said, lacks)


def stop_problems(conversation: Conversation, tokenizer: TokenizerFacts) -> list[str]:
    """Stop tokens that this tokenizer has not, or has as something else: replies would not end, or end too soon.

    And tokens before a conversation that are no special ones.
    """
    found = unknown_stops(
        conversation.stop_token_ids,
        conversation.stop_str,
        tokenizer.tokens,
        tokenizer.special,
        conversation.seps,
    )
    for i in conversation.system_prefix_token_ids or ():
        if i not in tokenizer.special:
            text = tokenizer.text(i)
            known = "not in the tokenizer" if text is None else f"{text!r} in this tokenizer"
            found.append(f"a conversation begins with token id {i}, which is {known}")
    return [
        f"template {conversation.name}: {each}: choose the template that the model was trained with" for each in found
    ]


def full_text(prompt: Prompt, tokenizer: TokenizerFacts) -> str:
    """A prompt as a Jinja template would write it: tokens that are given by id as their texts."""
    return "".join(tokenizer.text(i) or f"<token {i}>" for i in prompt.prefix_token_ids) + prompt.text


def difference(first: str, second: str, first_name: str, second_name: str) -> str:
    """A unified diff, in which the blanks at the end of a line are `·`."""
    lines = difflib.unified_diff(_lines(first), _lines(second), first_name, second_name, n=2, lineterm="")
    return "\n".join(lines)


def end_of_turn(after_reply: str, tokenizer: TokenizerFacts) -> str | None:
    """The special token with which the text after a reply begins."""
    text = after_reply.lstrip()
    found = [token for token, i in tokenizer.tokens.items() if i in tokenizer.special and text.startswith(token)]
    return max(found, key=len, default=None)


def _rendered(template: ChatTemplate, messages: Sequence[Mapping[str, str]]) -> str | None:
    """None where the template refuses system messages. Raises MlcBuildError where it refuses any other conversation."""
    try:
        return template.render(messages)
    except MlcBuildError:
        if messages[0] is _SYSTEM:
            return None
        raise


def _compare_stops(
    conversation: Conversation, checkpoint: CheckpointChat, rendered: str
) -> tuple[dict[str, list[str]], str]:
    """Both lists of tokens where the checkpoint's has more; and a sentence where replies would not end."""
    tokenizer = checkpoint.tokenizer
    ids = {*conversation.stop_token_ids, *(tokenizer.tokens.get(text) for text in conversation.stop_str)}
    ours = [text for text, i in sorted(tokenizer.tokens.items(), key=lambda item: item[1]) if i in ids]
    turn_end = end_of_turn(rendered.partition(_TURNS[1]["content"])[2], tokenizer)
    theirs = list(
        dict.fromkeys([*([turn_end] if turn_end else []), *filter(None, map(tokenizer.text, checkpoint.end_ids))])
    )
    if set(theirs) <= set(ours):
        return {}, ""
    problem = (
        f"it does not stop at `{turn_end}`, which ends this model's replies"
        if turn_end and turn_end not in ours
        else ""
    )
    return {"checkpoint": theirs, "template": ours}, problem


def _lines(text: str) -> list[str]:
    lines = [(line, len(line) - len(line.rstrip(" "))) for line in text.split("\n")]
    return [line.rstrip(" ") + "·" * blanks for line, blanks in lines]
