"""The next token from logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError


def sample(logits: npt.NDArray[np.float32], temperature: float, top_p: float, random: np.random.Generator) -> int:
    """A token drawn from float32 `logits` [vocab_size].

    Temperature 0 is the likeliest token, the first of equals. `top_p` keeps the smallest set of likeliest tokens whose
    probabilities reach it (nucleus sampling, Holtzman et al. 2019).
    """
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-weights, kind="stable")
    total = np.cumsum(weights[order])
    # The token that reaches top_p belongs to the set; rounding must never leave the set empty.
    kept = min(int(np.searchsorted(total, top_p * total[-1])) + 1, len(order))
    drawn = np.searchsorted(total[:kept], random.random() * total[kept - 1], side="right")
    return int(order[min(drawn, kept - 1)])


def check(temperature: float, top_p: float) -> None:
    """Raises MlcBuildError for settings that mean nothing."""
    if not temperature >= 0:
        raise MlcBuildError(f"temperature is {temperature}: expected 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise MlcBuildError(f"top_p is {top_p}: expected a number above 0, up to 1 (all tokens)")
