"""The next token from logits: penalties for what is there already, then a draw from the likeliest.

The order is that of transformers: repetition penalty, the other penalties, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises MlcBuildError for a setting that means nothing.

    `top_k` 0 keeps all tokens. `repetition_penalty` is of tokens of the prompt and of the text, `presence_penalty` and
    `frequency_penalty` are of the text alone. `logit_bias` is added to the logits of its tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed, expected in _RANGES:
            value = getattr(self, name)
            if not allowed(value):
                raise MlcBuildError(f"{name} is {value}: expected {expected}")


_RANGES: tuple[tuple[str, Any, str], ...] = (
    ("temperature", lambda t: 0 <= t < np.inf, "0 (the likeliest token) or more"),
    ("top_p", lambda p: 0 < p <= 1, "a number above 0, up to 1 (all tokens)"),
    ("top_k", lambda k: k >= 0, "0 (all tokens) or more"),
    ("min_p", lambda p: 0 <= p <= 1, "a number from 0 (all tokens) to 1 (the likeliest alone)"),
    ("repetition_penalty", lambda r: 0 < r < np.inf, "a number above 0 (1: none)"),
    ("presence_penalty", lambda p: abs(p) < np.inf, "a number (0: none)"),
    ("frequency_penalty", lambda p: abs(p) < np.inf, "a number (0: none)"),
    ("seed", lambda s: s is None or s >= 0, "0 or more"),
)
SETTINGS = tuple(each.name for each in fields(Sampling))


def defaults(config: Mapping[str, Any]) -> dict[str, float]:
    """The sampling that a package was published with: the settings in its mlc-chat-config.json."""
    return {name: config[name] for name in SETTINGS if type(config.get(name)) in (int, float)}


class Sampler:
    """Chooses the tokens of one text, and remembers them."""

    def __init__(self, settings: Sampling, prompt: Sequence[int]) -> None:
        self._settings = settings
        self._seen = set(prompt)
        self._counts: Counter[int] = Counter()
        self._random = np.random.default_rng(settings.seed)

    def choose(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token, by float32 `logits` [vocab_size]."""
        scores = penalised(logits, self._settings, self._seen, self._counts)
        token = int(np.argmax(scores)) if self._settings.temperature == 0 else self._draw(scores)
        self._seen.add(token)
        self._counts[token] += 1
        return token

    def _draw(self, scores: Scores) -> int:
        sums = np.cumsum(probabilities(scores, self._settings))
        drawn = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
        return min(drawn, int(np.searchsorted(sums, sums[-1])))  # rounding never leads to a token that was left out


def penalised(
    logits: npt.NDArray[np.float32], settings: Sampling, seen: set[int], counts: Mapping[int, int]
) -> npt.NDArray[Any]:
    """Logits [vocab_size] with penalties and bias: `seen` are the tokens of prompt and text, `counts` of the text.

    What is no token of this vocabulary is passed over.
    """
    factor, presence, frequency = settings.repetition_penalty, settings.presence_penalty, settings.frequency_penalty
    if factor == 1 and not (presence or frequency or settings.logit_bias):
        return logits
    scores = logits.astype(np.float64)
    if factor != 1:
        ids = _within(seen, scores)
        scores[ids] = np.where(scores[ids] > 0, scores[ids] / factor, scores[ids] * factor)
    if presence or frequency:
        ids = _within(counts, scores)
        scores[ids] -= presence + frequency * np.array([counts[i] for i in ids], np.float64)
    for token in _within(settings.logit_bias, scores):
        scores[token] += settings.logit_bias[token]
    return scores


def probabilities(scores: npt.NDArray[Any], settings: Sampling) -> Scores:
    """What a token above temperature 0 is drawn from: [vocab_size], 0 for what is left out, the sum not yet 1.

    `top_k` keeps the likeliest, with the last one's equals; `top_p` the smallest set of likeliest tokens whose
    probabilities reach it (nucleus sampling, Holtzman et al. 2019); `min_p` those that are at least so many times as
    likely as the likeliest one.
    """
    weights: Scores = np.exp((scores.astype(np.float64) - scores.max()) / settings.temperature)
    if 0 < settings.top_k < len(weights):
        weights[weights < np.partition(weights, -settings.top_k)[-settings.top_k]] = 0
    if settings.top_p < 1:
        order = _likeliest(weights, settings.top_p)
        sums = np.cumsum(weights[order])
        # The token that reaches top_p belongs to the set; rounding must never leave the set empty.
        kept = order[: int(np.searchsorted(sums, settings.top_p * weights.sum())) + 1]
        others, weights = weights, np.zeros_like(weights)
        weights[kept] = others[kept]
    if settings.min_p > 0:
        weights[weights < settings.min_p * weights.max()] = 0
    return weights


def _likeliest(weights: Scores, share: float) -> npt.NDArray[np.intp]:
    """Tokens from the likeliest on, equals by their number: so many that they hold `share` of all weights.

    To sort a whole vocabulary takes ten times as long as to find some hundred that nearly always hold it.
    """
    least = share * weights.sum()
    for count in (256, 4096):
        if count < len(weights):
            bound = np.partition(weights, -count)[-count] or np.nextafter(0, 1)  # it is 0 where top_k left fewer
            near = np.flatnonzero(weights >= bound)
            if weights[near].sum() >= least:
                return near[np.argsort(-weights[near], kind="stable")]
    return np.argsort(-weights, kind="stable")


def log_probabilities(logits: npt.NDArray[np.float32]) -> Scores:
    """The model's own log-probabilities, before penalties and temperature: [..., vocab_size]"""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    found: Scores = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return found


def _within(ids: Any, scores: Scores) -> list[int]:
    return [i for i in ids if 0 <= i < len(scores)]
