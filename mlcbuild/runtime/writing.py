"""One text while it is written: logits go in, a token is chosen, pieces of text come out.

Whoever has the logits drives it: `Model.stream` one text at a time, a conversation, a server many at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mlcbuild.runtime.sampling import Sampler, Sampling
from mlcbuild.runtime.text import TextStream


@dataclass(frozen=True)
class Ending:
    """Where texts end: at tokens, and before strings. `vocab_size` tokens can be sampled, the others are padding."""

    decode: Callable[[Sequence[int]], str]
    stop_ids: Collection[int]
    stop_strings: Sequence[str]
    vocab_size: int


class Grammar(Protocol):
    """What a text must look like, followed token by token."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """bool [vocab_size]: the tokens that may come next; none where the text cannot go on."""
        ...

    def accept(self, token: int) -> bool:
        """`token` has come; whether the text is complete, and nothing more may come."""
        ...


class Writer:
    """A text of at most `room` tokens after the prompt `ids`, with `grammar` one that obeys it.

    `tokens` are those written so far, without the one that ended the text. `finish_reason` is None while it goes on,
    then `stop` (a stop token or string) or `length`.
    """

    def __init__(
        self,
        ids: Sequence[int],
        ending: Ending,
        sampling: Sampling,
        room: int,
        stop: Sequence[str] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self.ids, self.room = ids, room
        self.tokens: list[int] = []
        self.finish_reason: str | None = None if room > 0 else "length"
        self.speed = Speed(len(ids))
        self._ending, self._grammar = ending, grammar
        self._sampler = Sampler(sampling, ids)
        self._text = TextStream(ending.decode, (*ending.stop_strings, *stop))

    def add(self, logits: npt.NDArray[np.float32]) -> str:
        """The text that is certain after one more token, sampled from `logits` [vocab_size]; may be empty."""
        scores = logits[: self._ending.vocab_size]
        if self._grammar is not None:
            allowed = self._grammar.allowed()[: len(scores)]
            if not allowed.any():
                return self._finish()
            scores = np.where(allowed, scores, np.float32(-np.inf))
        token = self._sampler.choose(scores)
        complete = self._grammar is not None and self._grammar.accept(token)
        self.speed.token()
        if token in self._ending.stop_ids:
            return self._finish()
        self.tokens.append(token)
        piece = self._text.add(token)
        if complete:
            return piece + self._finish()
        if len(self.tokens) == self.room:
            piece += self._text.finish()
            self.finish_reason = "length"
        if self._text.stopped:
            self.finish_reason = "stop"
        return piece

    def _finish(self) -> str:
        self.finish_reason = "stop"
        return self._text.finish()

    def report(self, text: str) -> dict[str, Any]:
        """What `generate --json` prints: the text, why it ended, and how fast it was."""
        return {"text": text, "finish_reason": self.finish_reason, **self.speed.to_json()}


class Speed:
    """Tokens and seconds: of the prompt up to the first token, and of the tokens after it.

    `reused` tokens of the prompt were in the KV cache already.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens, self.reused, self.tokens = prompt_tokens, 0, 0
        self.start()

    def start(self, reused: int = 0) -> None:
        """The prompt begins to be computed, all but its first `reused` tokens."""
        self.reused = reused
        self._start = self._first = self._last = time.perf_counter()

    def token(self) -> None:
        """One more token has come."""
        self._last = time.perf_counter()
        self._first = self._first if self.tokens else self._last
        self.tokens += 1

    @property
    def prefill(self) -> float:
        """Tokens of the prompt a second; 0 where nothing was measured."""
        return _rate(self.prompt_tokens - self.reused if self.tokens else 0, self._first - self._start)

    @property
    def decode(self) -> float:
        """Tokens a second after the first one; 0 where there are none."""
        return _rate(self.tokens - 1, self._last - self._first)

    def to_json(self) -> Mapping[str, float]:
        """Counts, and rates in tokens a second."""
        rates = {"prefill_tokens_per_second": self.prefill, "decode_tokens_per_second": self.decode}
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens}
        return {**counts, **{name: round(rate, 1) for name, rate in rates.items()}}

    def __str__(self) -> str:
        kept = f" ({self.reused} of them kept from before)" if self.reused else ""
        return (
            f"prompt: {self.prompt_tokens} tokens{kept}, {self.prefill:.0f} tokens/s; "
            f"text: {self.tokens} tokens, {self.decode:.1f} tokens/s"
        )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0
