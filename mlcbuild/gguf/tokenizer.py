"""The tokenizer's files that a GGUF file stands for: tokenizer.json, tokenizer_config.json, generation_config.json.

`tokenizer.ggml.model` is `gpt2` (byte-level BPE: tokens and merges) or `llama` (SentencePiece's BPE: tokens with
scores, of which merges are made as transformers does, convert_slow_tokenizer.py: of two halves that are tokens, those
whose whole has the better score first). Other kinds need `tokenizer_from`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlcbuild.errors import CheckpointError
from mlcbuild.gguf.header import Header

_UNKNOWN, _CONTROL, _DEFINED, _BYTE = 2, 3, 4, 6  # token types, SentencePiece's
_SPACE = "▁"
_ROLES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
          "pad_token": "padding_token_id"}  # fmt: skip
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Architectures of which a file that does not say how a text is cut, as before May 2024, is cut as llama.cpp does then.
_PLAIN = ("gpt2", "gptneox", "phi2")
ADVICE = "name a checkpoint that has its files: `tokenizer_from: {hf: owner/name}`"


def files(header: Header) -> dict[str, Any]:
    """The contents, by the files' names. Raises CheckpointError where the tokenizer is of a kind that is not made."""
    facts = {
        key.removeprefix("tokenizer.ggml."): v for key, v in header.facts.items() if key.startswith("tokenizer.ggml.")
    }
    kind, tokens = facts.get("model"), facts.get("tokens")
    if kind is None or not isinstance(tokens, list) or not tokens:
        raise CheckpointError(f"{header.file}: it has no tokenizer: {ADVICE}")
    for key, type_ in {"tokens": str, "merges": str, "scores": float, "token_type": int}.items():
        given = facts.get(key, [])
        if not isinstance(given, list) or not all(type(each) is type_ for each in given):
            raise CheckpointError(f"{header.file}: tokenizer.ggml.{key}: not a list of type {type_.__name__}: {ADVICE}")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{header.file}: a tokenizer of kind `{kind!s:.60}` is not made of a GGUF file: {ADVICE}")
    if len(set(tokens)) < len(tokens):
        tokens = _unlike(tokens)
    for key in ("token_type", "scores"):
        if len(facts.get(key, tokens)) != len(tokens):
            raise CheckpointError(f"{header.file}: {len(tokens)} tokens, but {len(facts[key])} in tokenizer.ggml.{key}")
    roles = {
        role: tokens[i] for role, key in _ROLES.items() if type(i := facts.get(key)) is int and 0 <= i < len(tokens)
    }
    made, begins = _byte_level(header, facts, tokens) if kind == "gpt2" else _sentencepiece(facts, tokens, roles)
    adds = {"bos_token": facts.get("add_bos_token", begins), "eos_token": facts.get("add_eos_token", False)}
    ends = [facts[key] for key in _ENDS if type(facts.get(key)) is int]
    if beyond := [each for each in ends if not 0 <= each < len(tokens)]:
        raise CheckpointError(f"{header.file}: a text ends at token {beyond[0]}, and there are {len(tokens)}: {ADVICE}")
    template = header.facts.get("tokenizer.chat_template")
    config = {
        **roles,
        **{f"add_{role}": adds[role] for role in adds},
        **({"chat_template": template} if isinstance(template, str) else {}),
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    ids = {f"{role}_id": facts[_ROLES[role]] for role in ("bos_token", "pad_token") if role in roles}
    types = facts.get("token_type", [1] * len(tokens))
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added(tokens, types),
            **made,
            "post_processor": _post(made, roles, tokens, adds),
        },
        "tokenizer_config.json": config,
        "generation_config.json": {**ids, **({"eos_token_id": list(dict.fromkeys(ends))} if ends else {})},
    }


@functools.cache
def _cuts() -> Mapping[str, Any]:
    import yaml

    text = (Path(__file__).parent / "tokenizers.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.load(text, yaml.CSafeLoader)["cuts"]
    return table


def _byte_level(header: Header, facts: Mapping[str, Any], tokens: Sequence[str]) -> tuple[dict[str, Any], bool]:
    if "pre" not in facts and header.architecture not in _PLAIN:
        raise CheckpointError(
            f"{header.file}: no tokenizer.ggml.pre, as in files before May 2024: how it cuts a text is not known: "
            f"{ADVICE}"
        )
    name = str(facts.get("pre", "gpt-2"))
    if name not in _cuts():
        raise CheckpointError(
            f"{header.file}: tokenizer.ggml.pre `{name:.60}`: how it cuts a text is not known; known are "
            f"{', '.join(_cuts())}: {ADVICE}"
        )
    how = _cuts()[name]
    splits = [
        {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False} for cut in how["cut"]
    ]
    vocabulary = _vocabulary(tokens)
    plain = not splits or how.get("then_plain", False)
    bytes_ = {"type": "ByteLevel", "add_prefix_space": bool(facts.get("add_space_prefix", False)), "trim_offsets": True}
    steps = [*splits, {**bytes_, "use_regex": plain}]
    merges = [merge.split(" ", 1) for merge in facts.get("merges", ())]
    if any(len(pair) < 2 or "".join(pair) not in vocabulary for pair in merges):
        raise CheckpointError(f"{header.file}: tokenizer.ggml.merges: two halves that make no token: {ADVICE}")
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": how.get("whole", False), "vocab": vocabulary, "merges": merges}  # fmt: skip
    made = {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "decoder": {**bytes_, "use_regex": True}, "model": model}  # fmt: skip
    return made, bool(how.get("begins", False))


def _sentencepiece(
    facts: Mapping[str, Any], tokens: Sequence[str], roles: Mapping[str, str]
) -> tuple[dict[str, Any], bool]:
    prefix = bool(facts.get("add_space_prefix", True))
    types = facts.get("token_type", [1] * len(tokens))
    scores = facts.get("scores", [-float(i) for i in range(len(tokens))])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    start = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = roles.get("unk_token") or next((tokens[i] for i, kind in enumerate(types) if kind == _UNKNOWN), None)
    model = {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": _BYTE in types, "ignore_merges": False,
             "vocab": _vocabulary(tokens), "merges": _merges(tokens, types, scores)}  # fmt: skip
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    made = {"normalizer": {"type": "Sequence", "normalizers": [*start, replace]}, "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders}, "model": model}  # fmt: skip
    return made, True


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[list[str]]:
    """Of every token the ways to make it of two; of all tokens, those with the best scores first."""
    known = {token: i for i, token in enumerate(tokens) if types[i] not in (_UNKNOWN, _CONTROL, _BYTE)}
    found = []
    for token, i in known.items():
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = sorted((known[a], known[b], a, b) for a, b in halves if a in known and b in known)
        found += [(-scores[i], -len(a), -len(b), a, b) for _, _, a, b in pairs]
    found.sort(key=lambda pair: pair[:3])
    return [[a, b] for *_, a, b in found]


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _unlike(tokens: Sequence[str]) -> list[str]:
    """Two tokens of one text are two in the model: the later ones, which no text has, get a name of their own."""
    known, made = set(tokens), dict[str, None]()
    for i, token in enumerate(tokens):
        name = token
        while name in made or (name != token and name in known):
            name += f"<{i}>"
        made[name] = None
    return list(made)


def _added(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": tokens[i], **flags, "special": kind != _DEFINED}
        for i, kind in enumerate(types)
        if kind in (_UNKNOWN, _CONTROL, _DEFINED)
    ]


def _post(
    made: Mapping[str, Any], roles: Mapping[str, str], tokens: Sequence[str], adds: Mapping[str, bool]
) -> dict[str, Any] | None:
    """What puts tokens before and behind a text, where the file says so."""
    given = {role: roles[role] for role, wanted in adds.items() if wanted and role in roles}
    if not given:
        return None
    begin = [{"SpecialToken": {"id": given["bos_token"], "type_id": 0}}] if "bos_token" in given else []
    end = [{"SpecialToken": {"id": given["eos_token"], "type_id": 0}}] if "eos_token" in given else []
    one, two = ([*begin, {"Sequence": {"id": name, "type_id": 0}}, *end] for name in "AB")
    vocabulary = made["model"]["vocab"]
    return {
        "type": "TemplateProcessing",
        "single": one,
        "pair": [*one, *two],
        "special_tokens": {
            token: {"id": token, "ids": [vocabulary[token]], "tokens": [token]} for token in given.values()
        },
    }
