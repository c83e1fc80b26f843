"""Answers that fit a JSON schema, or a grammar: llguidance says at each token which ones may follow."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.model import Model
from mlcbuild.runtime.tokenizer import JsonTokenizer


class Grammars:
    """What follows grammars in a model's tokens. Raises MlcBuildError for a tokenizer of another kind."""

    def __init__(self, model: Model) -> None:
        from llguidance import LLTokenizer

        if not isinstance(model.tokenizer, JsonTokenizer):
            raise MlcBuildError("only packages with a tokenizer.json can keep to a schema or a grammar")
        self._size = model.vocab_size
        ends = sorted(model.stop_ids()) or None  # else the tokenizer's own
        try:
            self._tokenizer = LLTokenizer(model.tokenizer.to_json(), n_vocab=self._size, eos_token=ends)
        except ValueError as error:
            raise MlcBuildError(f"llguidance cannot use this package's tokenizer: {error}") from None

    def fitting(self, schema: Mapping[str, Any]) -> Followed:
        """The grammar of a JSON schema, at its beginning. Raises MlcBuildError for a schema that is none."""
        from llguidance import LLMatcher

        def made() -> str:
            # Where blanks may stand, small models write nothing else.
            return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})

        return self._begun(made)

    def following(self, lark: str) -> Followed:
        """A grammar in llguidance's form of Lark, at its beginning. Raises MlcBuildError for one that is none."""
        from llguidance import LLMatcher

        return self._begun(lambda: LLMatcher.grammar_from_lark(lark))

    def _begun(self, made: Callable[[], str]) -> Followed:
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._tokenizer, made(), log_level=0)
        except ValueError as error:
            raise MlcBuildError(str(error)) from None
        if matcher.is_error():
            raise MlcBuildError(matcher.get_error())
        return Followed(matcher, self._size)


class Followed:
    """runtime.writing.Grammar of one text."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size

    def allowed(self) -> npt.NDArray[np.bool_]:
        """bool [vocab_size]"""
        if self._matcher.is_stopped() or self._matcher.is_error():
            return np.zeros(self._size, np.bool_)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._size, bitorder="little").astype(np.bool_)

    def accept(self, token: int) -> bool:
        """Whether the text is complete after `token`."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())
