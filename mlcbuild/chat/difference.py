"""Two renderings of one conversation, compared."""

from __future__ import annotations

import difflib

from mlcbuild.chat.conversation import Prompt
from mlcbuild.chat.tokenizer_info import TokenizerFacts


def full_text(prompt: Prompt, tokenizer: TokenizerFacts) -> str:
    """A prompt as a Jinja template would write it: tokens that are given by id as their texts."""
    return "".join(tokenizer.text(i) or f"<token {i}>" for i in prompt.prefix_token_ids) + prompt.text


def difference(first: str, second: str, first_name: str, second_name: str) -> str:
    """A unified diff, in which the blanks at the end of a line are `·`."""
    lines = difflib.unified_diff(_lines(first), _lines(second), first_name, second_name, n=2, lineterm="")
    return "\n".join(lines)


def _lines(text: str) -> list[str]:
    lines = [(line, len(line) - len(line.rstrip(" "))) for line in text.split("\n")]
    return [line.rstrip(" ") + "·" * blanks for line, blanks in lines]
