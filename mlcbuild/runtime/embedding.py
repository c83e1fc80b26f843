"""Hidden states of token ids, and what they are pooled to: the vector of a text.

Two kinds of library give hidden states: an encoder, whose `prefill(inputs, attention_mask)` sees all tokens at once,
and a decoder with `prefill_to_last_hidden_states`. How a package's vectors are pooled is `embedding_metadata` of its
mlc-chat-config.json, or else of its library: `pooling_strategy` (cls: the first token, mean, last) and `normalize` (to
length 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import threads
from mlcbuild.runtime.library import Library, Network
from mlcbuild.runtime.session import Session

Vectors = npt.NDArray[np.float32]

_POOLINGS: dict[str, Callable[[Vectors], Vectors]] = {
    "cls": lambda hidden: hidden[0],
    "mean": lambda hidden: hidden.mean(axis=0, dtype=np.float64).astype(np.float32),
    "last": lambda hidden: hidden[-1],
}
_SHORTEST = 1e-12  # a shorter vector has no direction to keep


@dataclass(frozen=True)
class Pooling:
    strategy: str
    normalize: bool


def is_encoder(library: Library) -> bool:
    """Whether `prefill` takes token ids and a mask, and there is no state."""
    return library.has("prefill") and not library.has("embed")


def pooling(config: Mapping[str, Any], library: Library) -> Pooling:
    """How a package pools. Raises MlcBuildError where neither it nor its library says so, or for an unknown way."""
    told = config.get("embedding_metadata") or library.metadata.embedding
    if told is None:
        raise MlcBuildError(
            f"{library.path}: a {library.metadata.model_task} model: neither it nor mlc-chat-config.json has "
            "`embedding_metadata`, which says how hidden states become the vector of a text"
        )
    strategy = told.get("pooling_strategy")
    if strategy not in _POOLINGS:
        raise MlcBuildError(f"pooling_strategy is {strategy!r}; known are {', '.join(_POOLINGS)}")
    return Pooling(strategy, bool(told.get("normalize", True)))


def pooled(hidden: Vectors, how: Pooling) -> Vectors:
    """hidden [n, hidden_size] -> [hidden_size]"""
    vector = _POOLINGS[how.strategy](hidden)
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return vector / np.float32(length) if how.normalize and length > _SHORTEST else vector


def hidden_states(network: Network, ids: Sequence[int]) -> Vectors:
    """float32 [len(ids), hidden_size]: what comes out of the last layer (and its norm).

    Raises MlcBuildError for ids that do not fit into the library's context, and for an id that is not in the
    vocabulary.
    """
    library = network.library
    if not len(ids):
        raise MlcBuildError("no tokens: hidden states are those of at least one token")
    if not is_encoder(library):
        session = Session(network, 1, len(ids) if library.metadata.context_window_size > 0 else None)
        return np.concatenate(list(session.hidden_states(session.add(), ids)))
    limit = library.metadata.prefill_chunk_size
    if len(ids) > limit:
        raise MlcBuildError(f"{len(ids)} tokens do not fit into this encoder, which sees at most {limit} at once")
    tokens = np.asarray([list(ids)], np.int64)
    wrong = tokens[(tokens < 0) | (tokens >= network.vocab_size)]
    if len(wrong):
        raise MlcBuildError(f"token id {wrong[0]} is not in this model's vocabulary of {network.vocab_size}")
    found: Vectors = encoded(network, tokens, np.ones(tokens.shape))[0]
    return found


def encoded(network: Network, tokens: npt.NDArray[Any], mask: npt.NDArray[Any]) -> Vectors:
    """float32 [b, s, hidden_size] of an encoder's ids [b, s]: of each text among its tokens whose mask is 1."""
    threads.configure(network.threads)
    library = network.library
    given = (library.device.tensor(each.astype(np.int32)) for each in (tokens, mask))
    return library.device.array(library["prefill"](*given, network.parameters), (*tokens.shape, -1))


def truncated(ids: Sequence[int], limit: int) -> list[int]:
    """At most `limit` of a text's tokens (-1: all), the last one kept: a text that ends with [SEP] still ends so."""
    return [*ids[: limit - 1], ids[-1]] if 0 < limit < len(ids) else list(ids)


def text_limit(config: Mapping[str, Any], library: Library) -> int:
    """The most tokens of a text, as the library takes it and the package's embedding_metadata says; -1: no bound."""
    metadata = library.metadata
    taken = metadata.prefill_chunk_size if is_encoder(library) else metadata.context_window_size
    said = (config.get("embedding_metadata") or {}).get("max_seq_length", -1)
    return min((limit for limit in (taken, said) if limit > 0), default=-1)


def embed(network: Network, config: Mapping[str, Any], texts: Iterable[Sequence[int]]) -> Vectors:
    """float32 [texts, hidden_size], for token ids with the special tokens that the model was trained with."""
    how, limit = pooling(config, network.library), text_limit(config, network.library)
    vectors = [pooled(hidden_states(network, truncated(ids, limit)), how) for ids in texts]
    return np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)
