"""What a tokenizer's files say: its tokens, which of them are special, and mlc-chat-config.json's `tokenizer_info`.

tokenizer.json is read as MLC LLM reads it (cpp/tokenizers/tokenizers.cc, July 2026). Where there is only a
SentencePiece tokenizer.model, MLC assumes defaults; here the model itself is asked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.chat import rwkv_vocabulary
from mlcbuild.errors import POINTER, MlcBuildError, pointer

CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"  # older tokenizers' own file of what the config says now

MOST_GROWTH = 100  # times as long as a text may be once it is normalised
LARGEST_JSON = 128 << 20  # bytes of a file; the largest tokenizers have 40 MB

_METHODS = {"ByteLevel": "byte_level", "ByteFallback": "byte_fallback"}
_WORD_START = "▁"  # SentencePiece's mark of a space
_SPECIAL = re.compile(r"<\|?[^\s<>|]+\|?>")  # <|im_end|>, </s>, <end_of_turn>
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # stands for one byte of text


@dataclass(frozen=True)
class TokenizerFacts:
    """`tokens` has every token with its id, added ones included; a `special` one is never a piece of text."""

    tokens: Mapping[str, int]
    special: frozenset[int]
    info: Mapping[str, Any]

    @property
    def rows(self) -> int:
        """How many rows of an embedding the tokens use: the largest id and one."""
        return max(self.tokens.values(), default=-1) + 1

    def text(self, token_id: int) -> str | None:
        """The token with this id."""
        return next((text for text, i in self.tokens.items() if i == token_id), None)


def read_tokenizer(files: Mapping[str, Path]) -> TokenizerFacts | None:
    """The facts of a checkpoint's or a package's files (name -> path); None where there is no tokenizer.

    Raises MlcBuildError for a file that cannot be read, and for added tokens that tokenizer.json does not have so.
    """
    if "tokenizer.json" in files:
        facts = json_tokenizer(read_json(files["tokenizer.json"]))
        _check_added(files, facts.tokens)
        return facts
    if "tokenizer.model" in files:
        added = read_json(files["added_tokens.json"]) if "added_tokens.json" in files else {}
        return _sentencepiece(files["tokenizer.model"], added)
    if rwkv_vocabulary.FILE in files:
        return rwkv_tokenizer(rwkv_vocabulary.read(files[rwkv_vocabulary.FILE]))
    sources = [name for name in sorted(files) if rwkv_vocabulary.SOURCE.fullmatch(name)]
    return rwkv_tokenizer(rwkv_vocabulary.read_source(files[sources[-1]])) if sources else None


def rwkv_tokenizer(vocabulary: rwkv_vocabulary.Vocabulary) -> TokenizerFacts:
    """The facts of a vocabulary of RWKV's world models, whose one special token no text contains."""
    tokens = {rwkv_vocabulary.text_of(token): i for i, token in vocabulary.items()}
    tokens[rwkv_vocabulary.END_TEXT] = rwkv_vocabulary.END
    return TokenizerFacts(tokens, frozenset({rwkv_vocabulary.END}), tokenizer_info(None))


def json_tokenizer(content: Mapping[str, Any]) -> TokenizerFacts:
    """The facts of tokenizer.json's content.

    Raises MlcBuildError as `vocabulary` does, and for a normalizer that makes texts longer than MOST_GROWTH says.
    """
    tokens = vocabulary(content)
    growth = _growth(content.get("normalizer"))
    if growth > MOST_GROWTH:
        raise MlcBuildError(
            f"tokenizer.json: its normalizer may make a text {growth:,.0f} times as long, of at most {MOST_GROWTH} "
            "times: it is not one that can be used"
        )
    listed = {token["id"] for token in content.get("added_tokens") or () if token.get("special")}
    return TokenizerFacts(tokens, frozenset(listed | _look_special(tokens)), tokenizer_info(content))


def tokenizer_info(tokenizer: Mapping[str, Any] | None) -> dict[str, Any]:
    """`tokenizer_info` for the content of tokenizer.json; MLC's defaults for None."""
    decoders = list(_steps(tokenizer, "decoder", "decoders"))
    normalizers = list(_steps(tokenizer, "normalizer", "normalizers"))
    methods = [_METHODS[step["type"]] for step in decoders if step.get("type") in _METHODS]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    prepend = {"type": "Prepend", "prepend": _WORD_START}
    return _info(
        methods[-1] if methods else "byte_fallback",
        prepend=any(prepend.items() <= step.items() for step in normalizers),
        strip=any(strip.items() <= step.items() for step in decoders),
    )


def vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Every token of tokenizer.json with its id, added tokens included.

    Raises MlcBuildError for a vocabulary that is none, and where an added token is listed twice: Hugging Face's reader
    then gives ids that differ from the model's.
    """
    try:
        vocab = tokenizer.get("model", {}).get("vocab", {})
        tokens = dict(vocab) if isinstance(vocab, Mapping) else {entry[0]: i for i, entry in enumerate(vocab)}
        listed = [(str(token["content"]), token["id"]) for token in tokenizer.get("added_tokens") or ()]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise MlcBuildError(f"tokenizer.json: not a tokenizer's: {type(error).__name__}: {error}") from None
    odd = [(text, i) for text, i in (*tokens.items(), *listed) if type(i) is not int or i < 0]
    if odd:
        raise MlcBuildError(f"tokenizer.json: the id of token {odd[0][0]!r} is {odd[0][1]!r}, expected a whole number")
    added: set[str] = set()
    for text, i in listed:
        if text in added:
            raise MlcBuildError(f"tokenizer.json: added token {text!r} is listed twice; remove one of its entries")
        added.add(text)
        tokens[text] = i
    return tokens


def first_tokens(tokenizer: Mapping[str, Any]) -> set[str]:
    """The special tokens that tokenizer.json puts before a text."""
    singles = [step.get("single") or [{}] for step in _steps(tokenizer, "post_processor", "processors")]
    return {single[0].get("SpecialToken", {}).get("id") for single in singles} - {None}


def special_tokens(files: Mapping[str, Path]) -> dict[str, str]:
    """The texts of `bos_token` and the like: those of tokenizer_config.json.

    As in transformers, those of special_tokens_map.json win, where the config has no `added_tokens_decoder`.
    """
    config = read_json(files[CONFIG]) if CONFIG in files else {}
    older = SPECIAL_MAP in files and "added_tokens_decoder" not in config
    named = {**config, **read_json(files[SPECIAL_MAP])} if older else config
    # A special token is written as its text, or as an object with flags.
    texts = {key: value.get("content") if isinstance(value, Mapping) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if key.endswith("_token") and isinstance(text, str) and text}


def unknown_stops(
    stop_token_ids: Sequence[int],
    stop_str: Sequence[str],
    tokens: Mapping[str, int],
    special: Collection[int] | None = None,
    written: Sequence[str] = (),
) -> list[str]:
    """What a template stops at that this tokenizer has no token for, or another one, each as a sentence.

    `special` are the ids that are no text (None: unknown), `written` what the template itself puts after a message. A
    stop string that looks like a special token (`<|im_end|>`) must be one, unless the template never writes it and all
    its stop ids are right: MLC's `gpt2` lists `</s>`, which GPT-2 has not. Any other may be plain text.
    """
    texts = {i: text for text, i in tokens.items()}
    problems = []
    for i in stop_token_ids:
        if i not in texts:
            problems.append(f"stop token id {i} is not in the tokenizer ({len(texts)} tokens)")
        elif special is not None and i not in special and not _part_of(texts[i], (*stop_str, *written)):
            instead = f", not {' or '.join(f'`{text}`' for text in stop_str)}" if stop_str else ""
            problems.append(
                f"stop token id {i} is {texts[i]!r} in this tokenizer{instead}: replies would end at an ordinary word"
            )
    ids_suffice = bool(stop_token_ids) and not problems and bool(written)
    problems += [
        f"stop token `{text}` is unknown to the tokenizer, which would cut it into pieces"
        for text in stop_str
        if _SPECIAL.fullmatch(text)
        and text not in tokens
        and not (ids_suffice and not any(text in other for other in written))
    ]
    return problems


def marks(text: str) -> set[str]:
    """What in a text looks like a special token."""
    return set(_SPECIAL.findall(text))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises MlcBuildError."""
    content = parse_json(path, path.name)
    if not isinstance(content, dict):
        raise MlcBuildError(f"{path.name}: expected a JSON object, found {json.dumps(content)[:40]}")
    return content


def parse_json(path: Path, name: str) -> Any:
    """A JSON file of a checkpoint, whose name is for the message. Raises MlcBuildError."""
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise MlcBuildError(f"{name}: {size:,} bytes; such a file has at most {LARGEST_JSON:,}")
        content = path.read_bytes()
        if content.startswith(POINTER):
            raise MlcBuildError(pointer(name))
        return json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MlcBuildError(f"{name}: cannot be read as JSON: {error}") from None


def _check_added(files: Mapping[str, Path], tokens: Mapping[str, int]) -> None:
    """transformers would add what other files name; MLC's runtimes read tokenizer.json alone."""
    added = read_json(files["added_tokens.json"]) if "added_tokens.json" in files else {}
    named = [("added_tokens.json", str(i), text) for text, i in added.items()]
    decoder = (read_json(files[CONFIG]) if CONFIG in files else {}).get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        texts = [(i, token.get("content")) for i, token in decoder.items() if isinstance(token, Mapping)]
        named += [(f"{CONFIG}: added_tokens_decoder", i, text) for i, text in texts if isinstance(text, str)]
    for where, i, text in named:
        if str(tokens.get(text)) != i:
            has = f"has as {tokens[text]}" if text in tokens else "lacks, and would cut into pieces"
            raise MlcBuildError(
                f"{where}: token {text!r} is {i}, which tokenizer.json {has}: save the tokenizer again, with "
                "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )


def _sentencepiece(path: Path, added: Mapping[str, int]) -> TokenizerFacts:
    from sentencepiece import SentencePieceProcessor

    try:
        content = path.read_bytes()
        if content.startswith(POINTER):
            raise MlcBuildError(pointer(path.name))
        model = SentencePieceProcessor(model_proto=content)
    except (OSError, RuntimeError) as error:
        raise MlcBuildError(f"{path.name}: not a SentencePiece model ({error})") from None
    ids = range(model.get_piece_size())
    tokens = {model.id_to_piece(i): i for i in ids} | dict(added)
    control = {i for i in ids if model.is_control(i) or model.is_unknown(i)}
    # Llama's models put a space before every text; it shows in what they make of a text that has none.
    prefixed = str(model.normalize("a")).startswith(_WORD_START)
    info = _info("byte_fallback", prepend=prefixed, strip=prefixed)
    return TokenizerFacts(tokens, frozenset(control | set(added.values()) | _look_special(tokens)), info)


def _info(method: str, prepend: bool, strip: bool) -> dict[str, Any]:
    return {"token_postproc_method": method, "prepend_space_in_encode": prepend, "strip_space_in_decode": strip}


def _look_special(tokens: Mapping[str, int]) -> set[int]:
    return {i for text, i in tokens.items() if _SPECIAL.fullmatch(text) and not _BYTE.fullmatch(text)}


def _part_of(token: str, texts: Sequence[str]) -> bool:
    """Whether a token is a piece of one of the plain texts: minigpt stops at the pieces of `###`."""
    plain = re.sub(f"[{_WORD_START}ĠĊ]", " ", token).strip()
    return bool(plain) and any(plain in text for text in texts if not _SPECIAL.search(text))


def _growth(step: Any) -> float:
    """How many times as long a text can be after a normalizer (tokenizers' `Replace`, in Sequences)."""
    if not isinstance(step, Mapping):
        return 1
    if step.get("type") == "Sequence":
        return min(math.prod(map(_growth, step.get("normalizers") or ())), 1e18)
    if step.get("type") != "Replace":
        return 1
    pattern, content = step.get("pattern"), step.get("content")
    if not isinstance(pattern, Mapping) or not isinstance(content, str):
        raise MlcBuildError("tokenizer.json: a normalizer of type Replace lacks its `pattern` or `content`")
    plain = pattern.get("String")
    # A regex, and a text of nothing, may match between any two characters.
    return max(1, len(content) / len(plain)) if isinstance(plain, str) and plain else 1 + len(content)


def _steps(tokenizer: Mapping[str, Any] | None, key: str, listed: str) -> Iterator[Mapping[str, Any]]:
    """The parts of a pipeline that may be one step, or a Sequence of them."""
    step = (tokenizer or {}).get(key)
    if isinstance(step, Mapping):
        yield from step.get(listed, ()) if step.get("type") == "Sequence" else (step,)
