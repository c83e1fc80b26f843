"""What the runtimes must know of a tokenizer beyond its files: mlc-chat-config.json's `tokenizer_info`.

The three facts are read from tokenizer.json as MLC LLM reads them (cpp/tokenizers/tokenizers.cc, July 2026).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlcbuild.errors import MlcBuildError

_METHODS = {"ByteLevel": "byte_level", "ByteFallback": "byte_fallback"}
_WORD_START = "▁"  # SentencePiece's mark of a space
_SPECIAL = re.compile(r"<\|?[^\s<>|]+\|?>")  # <|im_end|>, </s>, <end_of_turn>


def tokenizer_info(tokenizer: Mapping[str, Any] | None) -> dict[str, Any]:
    """`tokenizer_info` for the content of tokenizer.json; None (only tokenizer.model exists) gives MLC's defaults."""
    decoders = list(_steps(tokenizer, "decoder", "decoders"))
    normalizers = list(_steps(tokenizer, "normalizer", "normalizers"))
    methods = [_METHODS[step["type"]] for step in decoders if step.get("type") in _METHODS]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    prepend = {"type": "Prepend", "prepend": _WORD_START}
    return {
        "token_postproc_method": methods[-1] if methods else "byte_fallback",
        "prepend_space_in_encode": any(prepend.items() <= step.items() for step in normalizers),
        "strip_space_in_decode": any(strip.items() <= step.items() for step in decoders),
    }


def vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Every token of tokenizer.json with its id, added tokens included.

    Raises MlcBuildError where an added token is listed twice: Hugging Face's reader then gives ids that differ from
    the model's.
    """
    vocab = tokenizer.get("model", {}).get("vocab", {})
    tokens = dict(vocab) if isinstance(vocab, Mapping) else {entry[0]: i for i, entry in enumerate(vocab)}
    added: set[str] = set()
    for token in tokenizer.get("added_tokens") or ():
        if token["content"] in added:
            raise MlcBuildError(
                f"tokenizer.json: added token {token['content']!r} is listed twice; remove one of its entries"
            )
        added.add(token["content"])
        tokens[token["content"]] = token["id"]
    return tokens


def unknown_stops(stop_token_ids: Sequence[int], stop_str: Sequence[str], tokens: Mapping[str, int]) -> list[str]:
    """What a template stops at that the tokenizer has no token for, each as a sentence.

    Generation would never stop there. A stop string that is written like a special token (`<|im_end|>`) must be one;
    any other may be plain text.
    """
    ids = set(tokens.values())
    problems = [
        f"stop token id {i} is not in the tokenizer ({len(ids)} tokens)" for i in stop_token_ids if i not in ids
    ]
    problems += [
        f"stop token `{text}` is unknown to the tokenizer, which would cut it into pieces"
        for text in stop_str
        if _SPECIAL.fullmatch(text) and text not in tokens
    ]
    return problems


def _steps(tokenizer: Mapping[str, Any] | None, key: str, listed: str) -> Iterator[Mapping[str, Any]]:
    """The parts of a pipeline that may be one step, or a Sequence of them."""
    step = (tokenizer or {}).get(key)
    if isinstance(step, Mapping):
        yield from step.get(listed, ()) if step.get("type") == "Sequence" else (step,)
