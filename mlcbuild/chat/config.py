"""mlc-chat-config.json: what a runtime reads first of a weights folder.

Fields, their order and defaults are those of MLC LLM (python/mlc_llm/interface/gen_config.py and
protocol/mlc_chat_config.py, July 2026).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlcbuild.chat.conversation import Conversation
from mlcbuild.chat.tokenizer_info import TokenizerFacts, tokenizer_info
from mlcbuild.errors import MlcBuildError

VERSION = "0.1.0"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "tokenizer_model",
)

# What applies where neither generation_config.json nor config.json says it.
_SAMPLING = {
    "temperature": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "top_p": 1.0,
}
# Of the tokens that neither a config nor the tokenizer names. MLC's own default ends a text at token 2.
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": []}


def chat_config(
    model_type: str,
    quantization: str,
    model_config: Mapping[str, Any],
    conversation: Conversation,
    tokenizer: TokenizerFacts | None,
    tokenizer_files: Sequence[str],
    checkpoint_configs: Sequence[Mapping[str, Any]] = (),
    embedding: Mapping[str, Any] | None = None,
    special: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The content of mlc-chat-config.json.

    `model_config` is the architecture's own part (CONTRACT: hidden_size ... disaggregation); `tokenizer` is what the
    checkpoint's tokenizer says (None: it is not known); `checkpoint_configs` are generation_config.json and
    config.json, in the order in which the first to give a sampling default or a special token's id wins; `embedding`
    is `embedding_metadata` of a model of texts, None for one that writes; `special` are the ids of the tokenizer's
    `bos_token` and the like, for those that no config says. Raises MlcBuildError for a special token's id that is none,
    and for a sampling default that is no number.
    """
    vocab_size = model_config["vocab_size"]
    return {
        "version": VERSION,
        "model_type": model_type,
        "quantization": quantization,
        "model_config": dict(model_config),
        "vocab_size": vocab_size,
        "context_window_size": model_config.get("context_window_size", -1),
        "sliding_window_size": model_config.get("sliding_window_size", -1),
        "prefill_chunk_size": model_config["prefill_chunk_size"],
        "attention_sink_size": model_config.get("attention_sink_size", -1),
        "tensor_parallel_shards": model_config.get("tensor_parallel_shards", 1),
        "pipeline_parallel_stages": model_config.get("pipeline_parallel_stages", 1),
        # Rows of the embedding behind the tokenizer's last token are padding that must never be sampled.
        "active_vocab_size": vocab_size if tokenizer is None else min(vocab_size, tokenizer.rows),
        **_sampling(checkpoint_configs),
        "tokenizer_files": [name for name in TOKENIZER_FILES if name in tokenizer_files],
        "tokenizer_info": dict(tokenizer.info) if tokenizer else tokenizer_info(None),
        "conv_template": conversation.to_json(),
        **_token_ids([*checkpoint_configs, {f"{name}_id": i for name, i in (special or {}).items()}]),
        "model_task": "chat" if embedding is None else "embedding",
        "embedding_metadata": None if embedding is None else dict(embedding),
    }


def to_text(config: Mapping[str, Any]) -> str:
    """The file's text: the same for the same content."""
    return json.dumps(config, indent=2) + "\n"


def _sampling(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = _first(_SAMPLING, configs)
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MlcBuildError(f"generation_config.json or config.json: {key} is {value!r}, expected a number")
    return found


def _token_ids(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = _first(_TOKENS, configs)
    for key, value in found.items():
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if value is not _TOKENS[key] and not (ids and all(type(each) is int for each in ids)):
            expected = "the id of a token, or a list of ids" if key == "eos_token_id" else "the id of a token"
            raise MlcBuildError(f"generation_config.json or config.json: {key} is {value!r}, expected {expected}")
    return found


def _first(defaults: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each key's first value in `configs` that is not null, or its default."""
    given = {key: [config[key] for config in configs if config.get(key) is not None] for key in defaults}
    return {key: given[key][0] if given[key] else default for key, default in defaults.items()}
