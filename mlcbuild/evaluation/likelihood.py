"""How likely a model finds texts: of answers to questions, and of a text as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.model import Model
from mlcbuild.runtime.sampling import log_probabilities
from mlcbuild.runtime.session import Logits, Session, common

_MOST = 700.0  # nats a token: the exponential of more is no number
WINDOW = 2048  # tokens of a text that are looked at with one another, at most

Pair = tuple[Sequence[int], Sequence[int]]  # token ids that are given, and those that are judged after them


@dataclass(frozen=True)
class Judged:
    """The natural logarithm of the probability of a continuation, and whether each of its tokens is the likeliest."""

    log_probability: float
    likeliest: bool


@dataclass(frozen=True)
class OfText:
    """How likely a text is: by token (perplexity, which depends on the tokenizer), and by byte of UTF-8 (which does
    not)."""

    tokens: int
    perplexity: float
    bits_per_byte: float


def continuations(model: Model, pairs: Sequence[Pair]) -> list[Judged]:
    """The likelihood of each second part after its first, in the order given.

    What several share at their beginning, a question or its examples, is computed once. A first part that is too long
    for the model's context loses its beginning. Raises MlcBuildError where it is empty, and where the second part
    alone is too long.
    """
    limit = model.context_window_size
    judged: dict[int, Judged] = {}
    longest = max((len(given) + len(wanted) for given, wanted in pairs), default=1)
    session = model.session(1, longest if limit < 0 else min(longest, limit))
    sequence, before = session.add(), list[int]()
    for index in sorted(range(len(pairs)), key=lambda i: (*pairs[i][0], *pairs[i][1])):
        given, wanted = pairs[index]
        if not wanted:
            judged[index] = Judged(0.0, True)
            continue
        if not given:
            raise MlcBuildError("nothing is given before a text that is to be judged, not even a token to begin with")
        ids = [*given, *wanted][:-1]
        ids = ids if limit < 0 else ids[-limit:]
        first = len(ids) - len(wanted)  # the place whose logits tell the first wanted token
        if first < 0:
            raise MlcBuildError(f"{len(wanted)} tokens are to be judged at once, and the model's context is {limit}")
        judged[index] = _judged(_rows(session, sequence, before, ids, first), wanted, model.active_vocab_size)
        before = ids
    return [judged[index] for index in range(len(pairs))]


def of_text(model: Model, text: str) -> OfText:
    """The likelihood of a text, read in windows of at most WINDOW tokens, the last of which reaches back.

    Before it stands the token that texts begin with, or one that ends them; without either its first token is given.
    Raises MlcBuildError where there is nothing to judge.
    """
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    beginning = first_token(model)
    whole = ids if beginning is None or ids[:1] == [beginning] else [beginning, *ids]
    if len(whole) < 2:
        raise MlcBuildError("the text has no token to judge")
    limit = model.context_window_size
    pairs = list(windows(whole, WINDOW if limit < 0 else min(limit, WINDOW)))
    log_probability = sum(each.log_probability for each in continuations(model, pairs))
    tokens = len(whole) - 1
    surprise = -log_probability / tokens
    return OfText(tokens, math.exp(min(surprise, _MOST)), -log_probability / math.log(2) / len(text.encode()))


def windows(ids: Sequence[int], size: int) -> Iterator[Pair]:
    """Pairs that judge every token but the first once; each reads `size` tokens, or all that there are before it."""
    for start in range(1, len(ids), size):
        end = min(start + size, len(ids))
        yield ids[max(0, end - 1 - size) : start], ids[start:end]


def first_token(model: Model) -> int | None:
    """The token that texts of this model begin with, or one that ends them."""
    return model.first_token("eos_token_id")


def _rows(session: Session, sequence: int, before: list[int], ids: list[int], first: int) -> Iterator[Logits]:
    """Logits after each of `ids[first:]`, when the session has read `before`."""
    kept = session.truncate(sequence, min(common(before, ids), first))
    if kept < first:
        session.prefill(sequence, ids[kept:first])
    yield from session.all_logits(sequence, ids[first:])


def _judged(rows: Iterator[Logits], wanted: Sequence[int], vocab_size: int) -> Judged:
    total, likeliest, done = 0.0, True, 0
    for piece in rows:
        tokens = np.asarray(wanted[done : done + len(piece)])
        scores = log_probabilities(piece[:, :vocab_size])
        chosen = scores[np.arange(len(tokens)), tokens]
        total += float(chosen.sum())
        likeliest &= bool((chosen == scores.max(1)).all())
        done += len(piece)
    return Judged(total, likeliest)
