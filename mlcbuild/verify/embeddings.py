"""How far a quantized model of texts is from its reference: the vectors of texts, and the hidden states behind them.

For each document of a text, both models' hidden states [n, hidden_size] and the vectors that they are pooled to. Said
is the cosine between the two vectors, its mean and its lowest over the documents, and the root mean square of the
hidden states' difference as a fraction of that of the reference's hidden states. What the vectors are for, ranking
texts by their cosines, changes by about as much as the cosine is below 1. Everything is computed in float64.

Rounded as the figures of language models are (mlcbuild.verify.evaluate), so that `quality.json` is the same file on
every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.embedding import Pooling, Vectors, pooled

_DECIMALS = 4
HiddenStates = Callable[[Sequence[int]], Vectors]  # ids [n] -> [n, hidden_size]


@dataclass(frozen=True)
class Bounds:
    """The mean cosine below which there is a warning, or a failure. At a bound is still good."""

    warn_cosine: float
    fail_cosine: float


# docs/quantization.md says where the numbers come from.
BOUNDS = {
    "q0f32": Bounds(0.9999, 0.9999),
    "q0": Bounds(0.9995, 0.999),
    "q8": Bounds(0.999, 0.995),
    "q4": Bounds(0.98, 0.94),
    "q3": Bounds(0.93, 0.8),
}


@dataclass(frozen=True)
class Figures:
    """Over `texts` documents of `tokens` tokens together."""

    cosine: float
    lowest_cosine: float
    hidden_error: float
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
        cosines.append(float(one @ other) / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-30))
        difference += float(np.square(ours.astype(np.float64) - theirs).sum())
        size += float(np.square(theirs.astype(np.float64)).sum())
        done += len(ids)
        progress(done, total)
    if not cosines:
        raise MlcBuildError("the evaluation text has no document: nothing to evaluate on")
    error = math.sqrt(difference / max(size, 1e-30))
    return Figures(sum(cosines) / len(cosines), min(cosines), error, len(cosines), total)


def rounded(figures: Figures) -> dict[str, float | int]:
    """As they are published and judged."""
    said = asdict(figures).items()
    return {name: round(value, _DECIMALS) if isinstance(value, float) else value for name, value in said}


def bounds(kind: str, model_dtype: str, cosine: float | None = None) -> Bounds:
    """The bounds of a quantization class, or the model's own, which warns of nothing above it."""
    if cosine is not None:
        return Bounds(cosine, cosine)
    return BOUNDS["q0f32" if (kind, model_dtype) == ("q0", "float32") else kind]


def judge(figures: Mapping[str, float], limits: Bounds) -> tuple[str, list[str]]:
    """("passed" | "warned" | "failed", what is beyond which bound), for rounded figures."""
    cosine = figures["cosine"]
    if cosine < limits.fail_cosine:
        return "failed", [f"cosine {cosine:g} to the unquantized model's vectors is below {limits.fail_cosine:g}"]
    if cosine < limits.warn_cosine:
        return "warned", [
            f"cosine {cosine:g} to the unquantized model's vectors is below {limits.warn_cosine:g}, "
            "where a closer look pays"
        ]
    return "passed", []


def advice(figures: Mapping[str, float], limits: Bounds) -> str:
    """What a user is told of a package that missed a bound."""
    return (
        f"Cosine {figures['cosine']:g} (at least {limits.fail_cosine:g}), lowest {figures['lowest_cosine']:g}, "
        f"error of hidden states {figures['hidden_error']:.1%}, "
        f"over {figures['texts']} texts of {figures['tokens']} tokens.\n"
        "Use a finer quantization, or, where this is right for the model, say so in its YAML file: "
        "`verify: {cosine: ...}` for another bound, `verify: {gate: report}` to record a miss only"
    )


def _finite(hidden: Vectors, whose: str, text: int) -> Vectors:
    bad = ~np.isfinite(hidden).all(axis=-1)
    if bad.any():
        raise MlcBuildError(
            f"{whose} hidden states are NaN or Inf: document {text} of the evaluation text, "
            f"position {int(bad.argmax())}"
        )
    return hidden
