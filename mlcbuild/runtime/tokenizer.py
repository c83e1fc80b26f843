"""Text to token ids and back, from the tokenizer files of a weights folder."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mlcbuild.chat import rwkv_vocabulary
from mlcbuild.errors import MlcBuildError


class Tokenizer(Protocol):
    """What the runtime asks of a tokenizer, whatever its file format."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; `add_special_tokens` lets the tokenizer put its own before and after, as for a fresh text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        ...

    def tokens(self) -> dict[str, int]:
        """Every token with its id, added and special ones included."""
        ...

    def token_to_id(self, token: str) -> int | None: ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, tokenizer.model or RWKV's tokenizer_model, whichever is there first.

    Raises MlcBuildError where a folder has none, or a broken one.
    """
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder / "tokenizer.model")
    if (folder / rwkv_vocabulary.FILE).is_file():
        return RwkvTokenizer(folder / rwkv_vocabulary.FILE)
    raise MlcBuildError(f"{folder}: no tokenizer.json or tokenizer.model, so only token ids can go in and out")


class JsonTokenizer:
    """tokenizer.json, read by Hugging Face's tokenizers."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        try:
            self._tokenizer = HuggingFaceTokenizer.from_file(str(path))
        except Exception as error:  # the binding raises plain Exception
            raise MlcBuildError(f"{path}: not a tokenizer file ({error})") from error
        # A file may ask for truncation or padding, which a training run left in it.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        text: str = self._tokenizer.to_str()
        return text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(_checked(text), add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def tokens(self) -> dict[str, int]:
        found: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return found

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found


class SentencePieceTokenizer:
    """tokenizer.model of the Llama 1 and 2 era, with `added_tokens.json` and the flags of `tokenizer_config.json`."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise MlcBuildError(f"{path}: not a SentencePiece model ({error})") from error
        config = _read_json(path.with_name("tokenizer_config.json"))
        self._bos = self._model.bos_id() if config.get("add_bos_token", True) else -1
        self._eos = self._model.eos_id() if config.get("add_eos_token", False) else -1
        self._added: dict[str, int] = _read_json(path.with_name("added_tokens.json"))
        self._marks = re.compile(f"({'|'.join(map(re.escape, sorted(self._added, key=len, reverse=True)))})")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = []
        pieces = (
            self._marks.split(_checked(text)) if self._added else [_checked(text)]
        )  # added tokens stand for themselves
        for piece in filter(None, pieces):
            ids += [self._added[piece]] if piece in self._added else self._model.encode(piece)
        if not add_special_tokens:
            return ids
        return [self._bos] * (self._bos >= 0) + ids + [self._eos] * (self._eos >= 0)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode([i for i in ids if i < self._model.vocab_size()])
        return text

    def tokens(self) -> dict[str, int]:
        pieces = {self._model.id_to_piece(i): i for i in range(self._model.vocab_size())}
        return {**pieces, **self._added}

    @functools.cached_property
    def _by_text(self) -> dict[str, int]:
        return self.tokens()

    def token_to_id(self, token: str) -> int | None:
        return self._by_text.get(token)


class RwkvTokenizer:
    """tokenizer_model of RWKV's world models: at each byte the longest token that fits. It has no special tokens."""

    def __init__(self, path: Path) -> None:
        self._texts = {**rwkv_vocabulary.read(path), rwkv_vocabulary.END: b""}
        self._ids = {token: i for i, token in self._texts.items() if token}
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        # By the first two bytes, so that few lengths have to be tried.
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        data, at, ids = _checked(text).encode("utf-8"), 0, []
        while at < len(data):
            starts = (data[at : at + 2], data[at : at + 1])
            tokens = (data[at : at + length] for start in starts for length in self._lengths.get(start, ()))
            token = next((token for token in tokens if token in self._ids), None)
            if token is None:
                raise MlcBuildError(f"the vocabulary has no token for the byte {data[at]:#04x}")
            ids.append(self._ids[token])
            at += len(token)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._texts.get(i, b"") for i in ids).decode("utf-8", "replace")

    def tokens(self) -> dict[str, int]:
        return {**{rwkv_vocabulary.text_of(token): i for token, i in self._ids.items()}, rwkv_vocabulary.END_TEXT: 0}

    @functools.cached_property
    def _by_text(self) -> dict[str, int]:
        return self.tokens()

    def token_to_id(self, token: str) -> int | None:
        return self._by_text.get(token)


def _checked(text: str) -> str:
    """Bytes that are no UTF-8 come in from a terminal or a pipe as surrogates. Raises MlcBuildError for them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise MlcBuildError("the text is not Unicode: some of it is not UTF-8, or half of a surrogate pair") from None
    return text


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MlcBuildError(f"{path}: not JSON ({error})") from error
    return data if isinstance(data, dict) else {}
