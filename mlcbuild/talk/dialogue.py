"""A conversation of several turns, kept in the KV cache: a turn computes only what the cache does not have yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.model import Model
from mlcbuild.runtime.sampling import Sampling
from mlcbuild.runtime.session import common
from mlcbuild.runtime.writing import Writer

Message = dict[str, str]
_CHUNK = 256  # tokens of a prompt that are computed before `stop` is looked at again


class Dialogue:
    """Messages to and from a package, of which the last `window` tokens are known to it.

    `messages` has what was said, from the system message on. `dropped` counts the messages that the last answer was
    written without, the oldest: the model's window had no room for them. `last` is the last answer's writer.
    """

    def __init__(self, model: Model, sampling: Sampling, max_tokens: int, window: int) -> None:
        self.model, self.sampling = model, sampling
        limit = model.context_window_size
        self.window = min(limit, window) if limit > 0 else window
        self.messages: list[Message] = []
        self.dropped = 0
        self.last: Writer | None = None
        self._max_tokens = max_tokens
        self._session = model.session(1, self.window)
        self._sequence = self._session.add()
        self._cached: list[int] = []  # tokens in the KV cache
        self._stopped = False

    @property
    def in_window(self) -> int:
        """Tokens in the KV cache."""
        return len(self._cached)

    def ask(self, content: str) -> Iterator[str]:
        """The answer to a user's message, in pieces. Raises MlcBuildError where the message alone is too long."""
        self.messages.append({"role": "user", "content": content})
        return self._answer()

    def again(self) -> Iterator[str]:
        """Another answer to the user's last message. Raises MlcBuildError where nothing was asked."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            raise MlcBuildError("nothing was asked yet")
        return self._answer()

    def reset(self, system: str | None = None) -> None:
        """Begin anew: the system message stays, unless another one is given ("": the template's own)."""
        kept = [message for message in self.messages if message["role"] == "system"]
        told = [{"role": "system", "content": system}] if system else []
        self.messages = kept if system is None else told
        self.last, self.dropped = None, 0

    def stop(self) -> None:
        """End the answer that is being written, or about to be, before its next token. A signal handler may call it."""
        self._stopped = True

    def listen(self) -> None:
        """What was stopped so far is over: a `stop` from now on ends the answer to what is asked next."""
        self._stopped = False

    def _answer(self) -> Iterator[str]:
        try:
            ids = self._fitting()
        except MlcBuildError:
            self.messages.pop()
            raise
        most = min(self._max_tokens, self.window - len(ids))
        writer = self.last = self.model.writer(ids, most, (), self.sampling)
        said: list[str] = []
        try:
            for piece in self._write(writer):
                said.append(piece)
                yield piece
        finally:  # what was written before an interruption was said
            self.listen()
            self.messages.append({"role": "assistant", "content": "".join(said)})

    def _write(self, writer: Writer) -> Iterator[str]:
        ids = writer.ids
        same = min(common(self._cached, ids), len(ids) - 1)  # one gives the logits
        kept = self._session.truncate(self._sequence, same)
        self._cached = list(ids[:kept])
        writer.speed.start(kept)
        for start in range(kept, len(ids), _CHUNK):
            if self._stopped:
                return
            logits = self._session.prefill(self._sequence, ids[start : start + _CHUNK])
            self._cached += ids[start : start + _CHUNK]
        while not writer.finish_reason and not self._stopped:
            piece = writer.add(logits)
            if piece:
                yield piece
            if not writer.finish_reason and not self._stopped:
                logits = self._session.decode(self._sequence, writer.tokens[-1])
                self._cached.append(writer.tokens[-1])

    def _fitting(self) -> Sequence[int]:
        """Token ids of the conversation without its oldest turns, if it is too long for the window with an answer.

        Where something must go, half of the window is made free: the KV cache has to be computed again, and the next
        turns should not need that, too.
        """
        system = [message for message in self.messages if message["role"] == "system"]
        turns = self.messages[len(system) :]
        limit = self.window
        dropped = self.dropped
        ids = self.model.chat_prompt([*system, *turns[dropped:]])
        if len(ids) + min(self._max_tokens, limit // 4) <= limit:
            return ids
        while len(ids) > limit // 2 and dropped + 2 < len(turns):
            dropped += 2
            ids = self.model.chat_prompt([*system, *turns[dropped:]])
        if len(ids) >= limit:
            raise MlcBuildError(
                f"the message is too long: with it the prompt has {len(ids)} tokens, the window {limit}"
            )
        self.dropped = dropped  # not before: a message that is refused forgets nothing
        return ids
