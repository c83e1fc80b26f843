"""What the files of a checkpoint say of conversations, and of vectors.

Of conversations: its tokenizer, its chat template, the tokens that end a text. A package has the same files but for the
configs, whose `eos_token_id` is in its mlc-chat-config.json.

Of vectors, which a model of texts makes of hidden states: sentence-transformers' `modules.json` lists what follows the
transformer: a pooling, whose `config.json` is in a folder of its own, and perhaps a normalisation to length 1. What is
read becomes MLC's `embedding_metadata`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlcbuild.chat.conversation import Conversation
from mlcbuild.chat.jinja import ChatTemplate, read_chat_template
from mlcbuild.chat.tokenizer_info import (
    CONFIG,
    TokenizerFacts,
    first_tokens,
    parse_json,
    read_json,
    read_tokenizer,
    special_tokens,
)
from mlcbuild.errors import MlcBuildError

_PLAIN = "LM"  # the template without roles
_CONFIGS = ("generation_config.json", "config.json", "mlc-chat-config.json")
_LONGEST = "sentence_bert_config.json"  # of sentence-transformers: the most tokens of a text
_STRATEGIES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_MODES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}  # of `pooling_mode`, the newer form


@dataclass(frozen=True)
class CheckpointChat:
    """`end_ids` end a text, `begin_ids` are what the tokenizer itself puts before one; `special` are the ids of its
    `bos_token` and the like."""

    tokenizer: TokenizerFacts
    template: ChatTemplate | None
    end_ids: tuple[int, ...]
    special: Mapping[str, int] = field(default_factory=dict)
    begin_ids: tuple[int, ...] = ()


def read_checkpoint_chat(files: Mapping[str, Path]) -> CheckpointChat | None:
    """From the files by name; None where there is no tokenizer. Raises MlcBuildError for a broken file."""
    tokenizer = read_tokenizer(files)
    if tokenizer is None:
        return None
    known = tokenizer.tokens
    special = {name: known[text] for name, text in special_tokens(files).items() if text in known}
    ends, begins = _end_ids(files, special), _begin_ids(files, special)
    return CheckpointChat(tokenizer, read_chat_template(files), ends, special, begins)


def with_ends(conversation: Conversation, checkpoint: CheckpointChat) -> Conversation:
    """`LM`, which writes text as it is, begins and ends it as the checkpoint does: the ids in its file are llama's."""
    if conversation.name != _PLAIN:
        return conversation
    special = checkpoint.tokenizer.special
    ends = [token for token in checkpoint.end_ids if token in special] or list(checkpoint.end_ids)
    return replace(conversation, system_prefix_token_ids=list(checkpoint.begin_ids) or None, stop_token_ids=ends)


def embedding_metadata(files: Mapping[str, Path], default: Mapping[str, Any]) -> dict[str, Any]:
    """`default`, the architecture's own, with what the checkpoint's files (by name) say in its place.

    Raises MlcBuildError for a module or a pooling that no runtime computes.
    """
    if "modules.json" not in files:
        return dict(default)
    modules = parse_json(files["modules.json"], "modules.json")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise MlcBuildError(
            f"modules.json: the module {unknown[0]} follows the transformer, which no MLC runtime computes; remove it "
            "from the list if vectors without it are wanted"
        )
    found = {**default, "normalize": "Normalize" in kinds}
    if "Pooling" in kinds:
        name = f"{modules[kinds.index('Pooling')].get('path', '')}/config.json"
        if name not in files:
            raise MlcBuildError(f"modules.json names {name}, which the checkpoint does not have")
        found["pooling_strategy"] = _strategy(parse_json(files[name], name), name)
    longest = read_json(files[_LONGEST]).get("max_seq_length") if _LONGEST in files else None
    if longest is not None:
        if type(longest) is not int or longest < 1:
            raise MlcBuildError(f"{_LONGEST}: max_seq_length is {longest!r}, expected a number of tokens")
        found["max_seq_length"] = longest
    return found


def _end_ids(files: Mapping[str, Path], special: Mapping[str, int]) -> tuple[int, ...]:
    """`eos_token_id` of the first config that has one, and the tokenizer's `eos_token`."""
    ids: list[int] = []
    for name in _CONFIGS:
        if not ids and name in files:
            said = read_json(files[name]).get("eos_token_id")
            ids = [i for i in (said if isinstance(said, list) else [said]) if isinstance(i, int)]
    ids += [special["eos_token"]] if "eos_token" in special else []
    return tuple(dict.fromkeys(ids))


def _begin_ids(files: Mapping[str, Path], special: Mapping[str, int]) -> tuple[int, ...]:
    """`bos_token`, where tokenizer_config.json, or else the tokenizer, says that a text begins with it."""
    config = read_json(files[CONFIG]) if CONFIG in files else {}
    adds = config.get("add_bos_token")
    if adds is None and "tokenizer.json" in files:
        adds = special_tokens(files).get("bos_token") in first_tokens(read_json(files["tokenizer.json"]))
    elif adds is None:
        adds = "tokenizer.model" in files  # as sentencepiece's tokenizers do
    return (special["bos_token"],) if adds and "bos_token" in special else ()


def _strategy(config: Mapping[str, Any], name: str) -> str:
    mode = config.get("pooling_mode")
    chosen = (
        [str(mode)] if mode else [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    )
    known = _MODES if mode else _STRATEGIES
    if len(chosen) != 1 or chosen[0] not in known:
        raise MlcBuildError(
            f"{name}: pooling {' and '.join(chosen) or 'none'}; MLC's runtimes pool by one of {', '.join(known)}"
        )
    return known[chosen[0]]
