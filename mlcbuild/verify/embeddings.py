"""How far a quantized model of texts is from its reference: the vectors of texts, and the hidden states behind them.

For each document of a text, both models' hidden states [n, hidden_size] and the vectors that they are pooled to. Said
is the cosine between the two vectors, its mean and its lowest over the documents, and the root mean square of the
hidden states' difference as a fraction of that of the reference's hidden states. What the vectors are for, ranking
texts by their cosines, changes by about as much as the cosine is below 1. Everything is computed in float64.

The reference is looked at too: `likeness` is the lowest cosine between the vectors that it gives to the beginnings of
two documents that follow one another, cut to one length. One that cannot tell texts apart gives 1.

Rounded as the figures of language models are (mlcbuild.verify.evaluate), so that `quality.json` is the same file on
every machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.embedding import Pooling, Vectors, pooled
from mlcbuild.verify.evaluate import NotFinite

_DECIMALS = 4
_BEGINNING = 64  # tokens of a document that are enough to tell it from others
HiddenStates = Callable[[Sequence[int]], Vectors]  # ids [n] -> [n, hidden_size]


@dataclass(frozen=True)
class Figures:
    """Over `texts` documents of `tokens` tokens together."""

    cosine: float
    lowest_cosine: float
    hidden_error: float
    likeness: float
    texts: int
    tokens: int


def compare(
    model: HiddenStates,
    reference: HiddenStates,
    how: Pooling,
    texts: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Figures:
    """`model` against `reference` on the token ids of some documents.

    Raises MlcBuildError for hidden states that are not finite, naming whose and where, and where there is no document.
    """
    cosines: list[float] = []
    difference = size = 0.0
    done, total = 0, sum(len(ids) for ids in texts)
    for number, ids in enumerate(texts):
        ours = _finite(model(ids), "the package's", number)
        theirs = _finite(reference(ids), "the reference's", number)
        one, other = (pooled(hidden, how).astype(np.float64) for hidden in (ours, theirs))
        cosines.append(_cosine(one, other))
        difference += float(np.square(ours.astype(np.float64) - theirs).sum())
        size += float(np.square(theirs.astype(np.float64)).sum())
        done += len(ids)
        progress(done, total)
    if not cosines:
        raise MlcBuildError("the evaluation text has no document: nothing to evaluate on")
    error = math.sqrt(difference / max(size, 1e-30))
    return Figures(
        sum(cosines) / len(cosines), min(cosines), error, _likeness(reference, how, texts), len(cosines), total
    )


def rounded(figures: Figures) -> dict[str, float | int]:
    """As they are published and judged."""
    said = asdict(figures).items()
    return {name: round(value, _DECIMALS) if isinstance(value, float) else value for name, value in said}


def _likeness(reference: HiddenStates, how: Pooling, texts: Sequence[Sequence[int]]) -> float:
    found = []
    for pair in itertools.pairwise(texts):
        one, other = (list(ids[: min(_BEGINNING, *map(len, pair))]) for ids in pair)
        if one != other:
            found.append(_cosine(*(pooled(reference(ids), how).astype(np.float64) for ids in (one, other))))
    return min(found, default=0.0)


def _cosine(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    return float(one @ other) / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-30)


def _finite(hidden: Vectors, whose: str, text: int) -> Vectors:
    bad = ~np.isfinite(hidden).all(axis=-1)
    if bad.any():
        raise NotFinite(
            f"{whose} hidden states are NaN or Inf: document {text} of the evaluation text, "
            f"position {int(bad.argmax())}"
        )
    return hidden
