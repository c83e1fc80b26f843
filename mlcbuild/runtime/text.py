"""Token ids as they are sampled, turned into pieces of text that are safe to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of the first bytes of a longer character


class TextStream:
    """Pieces of text for token ids that arrive one at a time.

    A character of several bytes may be spread over several tokens, and a stop string over several pieces: such a tail
    is held back until the next token shows what it is. `stopped` says that a stop string came; the text ends before it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []
        self._begin = 0  # first id of the context that the next piece is decoded in (a decoder joins words by it)
        self._shown = 0  # ids whose text has been handed on
        self._held = ""  # decoded, but possibly the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain after one more token; may be empty."""
        self._ids.append(token)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """What was held back, now that no token follows."""
        return self._release(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        before = self._decode(self._ids[self._begin : self._shown])
        after = self._decode(self._ids[self._begin :])
        if after.endswith(_INCOMPLETE) and not final:
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = 0 if final else self._overlap(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _overlap(self, text: str) -> int:
        """The length of the longest tail of `text` with which a stop string begins."""
        return max(
            (n for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
            default=0,
        )
