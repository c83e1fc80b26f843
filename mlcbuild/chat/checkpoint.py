"""What the files of a checkpoint say of conversations: its tokenizer, its chat template, the tokens that end a text.

A package has the same files but for the configs, whose `eos_token_id` is in its mlc-chat-config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlcbuild.chat.jinja import ChatTemplate, read_chat_template
from mlcbuild.chat.tokenizer_info import TokenizerFacts, read_json, read_tokenizer

_CONFIGS = ("generation_config.json", "config.json", "mlc-chat-config.json")


@dataclass(frozen=True)
class CheckpointChat:
    tokenizer: TokenizerFacts
    template: ChatTemplate | None
    end_ids: tuple[int, ...]


def read_checkpoint_chat(files: Mapping[str, Path]) -> CheckpointChat | None:
    """From the files by name; None where there is no tokenizer. Raises MlcBuildError for a broken file."""
    tokenizer = read_tokenizer(files)
    if tokenizer is None:
        return None
    template = read_chat_template(files)
    return CheckpointChat(tokenizer, template, _end_ids(files, tokenizer))


def _end_ids(files: Mapping[str, Path], tokenizer: TokenizerFacts) -> tuple[int, ...]:
    """`eos_token_id` of the first config that has one, and the tokenizer's `eos_token`."""
    ids: list[int] = []
    for name in _CONFIGS:
        if not ids and name in files:
            said = read_json(files[name]).get("eos_token_id")
            ids = [i for i in (said if isinstance(said, list) else [said]) if isinstance(i, int)]
    if "tokenizer_config.json" in files:
        eos = read_json(files["tokenizer_config.json"]).get("eos_token")
        text = eos.get("content") if isinstance(eos, Mapping) else eos
        ids += [tokenizer.tokens[text]] if isinstance(text, str) and text in tokenizer.tokens else []
    return tuple(dict.fromkeys(ids))
