"""A package's conversation template beside the checkpoint's own: the same conversation, rendered both ways."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.chat.checkpoint import CheckpointChat, read_checkpoint_chat
from mlcbuild.chat.conversation import Conversation, Prompt, render
from mlcbuild.chat.tokenizer_info import TokenizerFacts, unknown_stops
from mlcbuild.errors import MlcBuildError

_SYSTEM = {"role": "system", "content": "Answer in one sentence."}
_TURNS = (
    {"role": "user", "content": "What is a star?"},
    {"role": "assistant", "content": "A ball of hot gas."},
    {"role": "user", "content": "And a planet?"},
)


@dataclass(frozen=True)
class TemplateReport:
    """`report` is what quality.json says under `template`; `warnings` are its differences in a sentence each."""

    report: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def check(conversation: Conversation, folder: Path) -> tuple[TemplateReport, list[str]]:
    """A package's template beside what the files in its weights folder say; and what is wrong with its stop tokens."""
    checkpoint = read_checkpoint_chat({path.name: path for path in folder.iterdir()})
    if checkpoint is None:
        return TemplateReport({"checked": False, "reason": "there is no tokenizer"}), []
    return compare(conversation, checkpoint), stop_problems(conversation, checkpoint.tokenizer)


def compare(conversation: Conversation, checkpoint: CheckpointChat) -> TemplateReport:
    """The template against the checkpoint's Jinja.

    `report`: `checked` (with a `reason` where it is not), `differs` (a diff of system message, two turns and the
    beginning of a reply), `differs_by_default` (the same without a system message, where each has its own default),
    `stop_tokens` (where the template does not stop at all tokens that end the checkpoint's texts).
    """
    template, tokenizer = checkpoint.template, checkpoint.tokenizer
    if template is None:
        return TemplateReport({"checked": False, "reason": "the checkpoint has no chat_template"})
    report: dict[str, Any] = {"checked": True}
    warnings = []
    try:
        by_default = template.render(_TURNS)
    except MlcBuildError as error:
        return TemplateReport({"checked": False, "reason": str(error)})
    try:
        texts = template.render([_SYSTEM, *_TURNS])
        messages: Sequence[Mapping[str, str]] = [_SYSTEM, *_TURNS]
    except MlcBuildError:  # a model without system messages
        texts, messages = by_default, _TURNS
    names = (f"{template.origin}: chat_template", f"template {conversation.name}")
    found = difference(texts, full_text(render(conversation, messages), tokenizer), *names)
    if found:
        report["differs"] = found
        warnings.append(f"it does not write conversations as {names[0]} does (quality.json has the difference)")
    found = difference(by_default, full_text(render(conversation, _TURNS), tokenizer), *names)
    if found and found != report.get("differs"):
        report["differs_by_default"] = found
    stops, problem = _compare_stops(conversation, checkpoint, texts)
    if stops:
        report["stop_tokens"] = stops
    if problem:
        warnings.append(problem)
    return TemplateReport(report, tuple(f"template {conversation.name}: {warning}" for warning in warnings))


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
