"""Sequences in a KV cache or a recurrent state, and the library's prefill and decode functions on them.

The order of calls is the runtime's own: `kv_state_begin_forward(cache, sequences, lengths)`, the library's function,
`kv_state_end_forward`. Everything here is in token ids and float32 logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import threads, tvm_runtime
from mlcbuild.runtime.library import CACHE, CREATE, STATE, Network

Logits = npt.NDArray[np.float32]

_HISTORY = 1  # steps of a recurrent state that are kept: one, since nothing here takes steps back
_PAGE_SIZE = 16  # tokens of a KV cache page; MLC's engine uses the same
_PIECE = 256  # positions whose logits are held at once in `all_logits`: 130 MB for a vocabulary of 128k


class Session:
    """A state for `max_sequences` sequences of up to `length` tokens each (default: as many as the library takes).

    With a sliding window a sequence may grow on; the cache keeps the window. The state of a recurrent model has one
    size however long a sequence is; a hybrid has both. Raises MlcBuildError for a library that keeps no state of a kind
    that is known here, and where a limit of the library is exceeded.
    """

    def __init__(self, network: Network, max_sequences: int = 1, length: int | None = None) -> None:
        library = network.library
        metadata = library.metadata
        creating = CREATE.get(metadata.kv_state_kind, ())
        absent = next((name for name in creating if not library.has(name)), None)
        if not creating or absent is not None:
            raise MlcBuildError(
                f"{library.path}: its state is `{metadata.kv_state_kind}`"
                + (f", but it has no `{absent}`" if absent else "")
                + f"; this runtime continues texts with {' and '.join(f'`{kind}`' for kind in CREATE)} libraries"
            )
        if not 1 <= max_sequences <= metadata.max_batch_size:
            raise MlcBuildError(
                f"{library.path}: compiled for at most {metadata.max_batch_size} sequences at once, not {max_sequences}"
            )
        self.max_sequences = max_sequences
        self.lengths: dict[int, int] = {}  # tokens of each sequence so far
        self.limit = length if length is not None else metadata.context_window_size  # of a sequence; -1: none
        self._network = network
        self._library = library
        self._chunk = metadata.prefill_chunk_size
        self._sliding = metadata.sliding_window_size
        self._next = 0
        self._recurrent = STATE in creating
        sizes = {CACHE: self._cache_sizes(), STATE: (max_sequences, _HISTORY)}
        self._states = [self._call(name, *map(tvm_runtime.shape, sizes[name])) for name in creating]

    def _cache_sizes(self) -> tuple[int, ...]:
        # What has slid out of the window is freed only after the chunk that pushed it out.
        kept = self._sliding + self._chunk if self._sliding > 0 else self.limit
        total = self.max_sequences * -(-kept // _PAGE_SIZE) * _PAGE_SIZE
        return self.max_sequences, total, self._chunk, _PAGE_SIZE, int(self._sliding > 0)

    def add(self) -> int:
        """A new, empty sequence; its number."""
        self._check_room()
        sequence, self._next = self._next, self._next + 1
        self._begin(sequence)
        return sequence

    def _check_room(self) -> None:
        if len(self.lengths) == self.max_sequences:
            raise MlcBuildError(
                f"this session holds {self.max_sequences} sequences; remove one, or make a larger session"
            )

    def _begin(self, sequence: int) -> None:
        self._state("add_sequence", sequence)
        if self._sliding > 0:
            sink = max(self._library.metadata.attention_sink_size, 0)
            enable = tvm_runtime.function("vm.builtin.attention_kv_cache_enable_sliding_window_for_seq")
            enable(self._states[0], sequence, self._sliding, sink)
        self.lengths[sequence] = 0

    def remove(self, sequence: int) -> None:
        del self.lengths[sequence]
        self._state("remove_sequence", sequence)

    @property
    def forks(self) -> bool:
        """Whether sequences can have a beginning in common: not in a recurrent state, nor where a window slides."""
        return not self._recurrent and self._sliding <= 0

    def fork(self, sequence: int, length: int) -> int:
        """A new sequence that begins with the first `length` tokens of another, without computing or keeping them
        twice; its number. Raises MlcBuildError where sequences do not fork (`forks`), and where there is no room."""
        if not self.forks:
            reason = "a recurrent state has no beginning" if self._recurrent else "a sliding window forgets beginnings"
            raise MlcBuildError(f"{self._library.path}: sequences do not fork here: {reason}; read the text again")
        self._check_room()
        child, self._next = self._next, self._next + 1
        self._state("fork_sequence", sequence, child, length)
        self.lengths[child] = length
        return child

    def truncate(self, sequence: int, length: int) -> int:
        """Forget all but the first `length` tokens; how many are kept: a recurrent state or a sliding window starts
        again from none, because what it had forgotten does not come back."""
        surplus = self.lengths[sequence] - length
        if surplus <= 0:
            return self.lengths[sequence]
        if self._recurrent or self._sliding > 0 or length == 0:
            self.remove(sequence)
            self._begin(sequence)
            return 0
        self._state("popn", sequence, surplus)
        self.lengths[sequence] = length
        return length

    def prefill(self, sequence: int, ids: Sequence[int]) -> Logits:
        """Append `ids`; the logits after the last of them: float32 [vocab_size]."""
        if not self._library.has("prefill"):
            return self.batch_prefill([sequence], [ids]).reshape(-1)
        logits = None
        for piece in _pieces(ids, self._chunk):
            logits = self._forward("prefill", [sequence], [len(piece)], self._embed(piece, (1, len(piece))))
        return self._array(logits, -1)

    def decode(self, sequence: int, token: int) -> Logits:
        """Append one token; the logits after it: float32 [vocab_size]."""
        if not self._library.has("decode"):
            return self.batch_decode([sequence], [token]).reshape(-1)
        return self._array(self._forward("decode", [sequence], [1], self._embed([token], (1, 1))), -1)

    def batch_prefill(self, sequences: Sequence[int], ids: Sequence[Sequence[int]]) -> Logits:
        """Append `ids[i]` to `sequences[i]`; the logits after each one's last token: float32 [sequences, vocab_size].

        What does not fit into one prefill chunk goes in as several. A recurrent model takes one sequence after another.
        """
        last: dict[int, Logits] = {}
        waiting = [(i, list(tokens)) for i, tokens in enumerate(ids)]
        if not all(tokens for _, tokens in waiting):
            raise MlcBuildError("batch_prefill: each sequence needs at least one token")
        most = 1 if self._recurrent else len(waiting)
        while waiting:
            batch: list[tuple[int, list[int]]] = []
            room = self._chunk
            while waiting and room and len(batch) < most:
                index, tokens = waiting.pop(0)
                batch.append((index, tokens[:room]))
                if tokens[room:]:
                    waiting.insert(0, (index, tokens[room:]))
                room -= len(batch[-1][1])
            rows = self._batch_prefill([sequences[i] for i, _ in batch], [tokens for _, tokens in batch])
            last.update({i: row for (i, _), row in zip(batch, rows, strict=True)})
        return np.stack([last[i] for i in range(len(ids))])

    def batch_decode(self, sequences: Sequence[int], tokens: Sequence[int]) -> Logits:
        """Append one token to each sequence; the logits after it: float32 [len(sequences), vocab_size]."""
        embedded = self._embed(tokens, (len(tokens), 1))
        return self._array(self._forward("batch_decode", sequences, [1] * len(tokens), embedded), len(tokens), -1)

    def all_logits(self, sequence: int, ids: Sequence[int]) -> Iterator[Logits]:
        """Append `ids`; the logits after every one of them, in pieces of some rows: float32 [rows, vocab_size].

        `batch_verify` gives every position. A library without it gives as many at once as it takes sequences:
        the buffers of its `batch_prefill` are planned for no more.
        """
        verify = self._library.has("batch_verify")
        size = min(self._chunk, _PIECE if verify else self._library.metadata.max_batch_size)
        for piece in _pieces(ids, size):
            embedded = self._embed(piece, (1, len(piece)))
            if verify:
                logits = self._forward("batch_verify", [sequence], [len(piece)], embedded)
            else:
                positions = self._ids(range(len(piece)))
                logits = self._forward("batch_prefill", [sequence], [len(piece)], embedded, positions)
            if logits.shape[-2] != len(piece):  # upstream's recurrent libraries give the last position only
                raise MlcBuildError(
                    f"{self._library.path}: it gives logits of {logits.shape[-2]} of {len(piece)} positions; "
                    "compile a library with mlcbuild to get all of them"
                )
            yield self._array(logits, len(piece), -1)

    def hidden_states(self, sequence: int, ids: Sequence[int]) -> Iterator[Logits]:
        """Append `ids`; the hidden states behind the last layer's norm, in pieces: float32 [rows, hidden_size].

        Raises MlcBuildError where the library has no `prefill_to_last_hidden_states`.
        """
        name = "prefill_to_last_hidden_states"
        if not self._library.has(name):
            raise MlcBuildError(f"{self._library.path}: no `{name}`: this library tells logits, but no hidden states")
        for piece in _pieces(ids, self._chunk):
            hidden = self._forward(name, [sequence], [len(piece)], self._embed(piece, (1, len(piece))))
            yield self._array(hidden, len(piece), -1)

    def _batch_prefill(self, sequences: Sequence[int], ids: Sequence[Sequence[int]]) -> Logits:
        lengths = [len(tokens) for tokens in ids]
        flat = [token for tokens in ids for token in tokens]
        embedded = self._embed(flat, (1, len(flat)))
        positions = self._ids(np.cumsum(lengths) - 1)
        return self._array(self._forward("batch_prefill", sequences, lengths, embedded, positions), len(ids), -1)

    def _embed(self, ids: Sequence[int], shape: tuple[int, int]) -> Any:
        """[shape..., hidden_size], in the model's dtype.

        Ids are checked: a kernel would read whatever lies behind the embedding table.
        """
        array = np.asarray(list(ids), np.int64)
        wrong = array[(array < 0) | (array >= self._network.vocab_size)]
        if len(wrong):
            raise MlcBuildError(f"token id {wrong[0]} is not in this model's vocabulary of {self._network.vocab_size}")
        embedded = self._call("embed", self._ids(array), self._network.parameters)
        return tvm_runtime.view(embedded, (*shape, embedded.shape[-1]), str(embedded.dtype))

    def _forward(self, name: str, sequences: Sequence[int], lengths: Sequence[int], *arguments: Any) -> Any:
        self._check(sequences, lengths)
        self._state("begin_forward", tvm_runtime.shape(*sequences), tvm_runtime.shape(*lengths))
        try:
            logits = self._call(name, *arguments, *self._states, self._network.parameters)[0]
        finally:  # an interrupted cache can still be emptied and used again
            self._state("end_forward")
        for sequence, length in zip(sequences, lengths, strict=True):
            self.lengths[sequence] += length
        return logits

    def _check(self, sequences: Sequence[int], lengths: Sequence[int]) -> None:
        for sequence, length in zip(sequences, lengths, strict=True):
            if sequence not in self.lengths:
                raise MlcBuildError(f"sequence {sequence} is not in this session")
            if 0 < self.limit < self.lengths[sequence] + length:
                raise MlcBuildError(
                    f"sequence {sequence} would be {self.lengths[sequence] + length} tokens long; "
                    f"this session has room for {self.limit}"
                )

    def _call(self, name: str, *arguments: Any) -> Any:
        threads.configure(self._network.threads)
        return self._library[name](*arguments)

    def _state(self, method: str, *arguments: Any) -> None:
        for state in self._states:
            tvm_runtime.function(f"vm.builtin.kv_state_{method}")(state, *arguments)

    def _ids(self, ids: Any) -> Any:
        """int32 [n], on the device"""
        return self._library.device.tensor(np.asarray(list(ids), np.int32))

    def _array(self, logits: Any, *shape: int) -> Logits:
        if logits is None:
            raise MlcBuildError("no tokens: a model needs at least one to say what follows")
        return self._library.device.array(logits, shape)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _pieces(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))
