"""How far a quantized model is from its reference, over a text.

Per position that predicts a token of the text, with p the reference's and q the model's distribution:
KL divergence sum(p (log p - log q)) in nats, whether both have the same likeliest token, and the surprise -log of the
token that came, whose mean's exponential is the perplexity. Everything after the logits is float64.

Rounding. `quality.json` shall be the same file on every machine, but float32 kernels of two CPUs add in different
orders and differ by about 1e-6 of a logit, float16 ones by 1e-3. No rounding is safe against a figure that lies at a
boundary; coarse ones make that unlikely. Two digits of the divergence (not finer than 1e-4, where a float16 model's
own noise is), three of a perplexity, 0.1 % of its increase and 1 % of agreement change with a chance of about 1e-4 per
figure between float32 libraries, and of a few percent between float16 ones. Two runs of the same library on the same
text are equal whatever the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.tokenizer import Tokenizer

SEPARATOR = "<|endoftext|>"  # between the documents of an evaluation text
WINDOW = 1024  # tokens that are evaluated with one another at most; longer documents are cut

Logits = npt.NDArray[np.float32]
LogitsOf = Callable[[Sequence[int]], Iterable[Logits]]  # ids [n] -> pieces whose rows are [n, vocab_size]

_KL_DIGITS, _KL_FINEST = 2, 4  # significant digits, and decimals that are never exceeded
_PERPLEXITY_DIGITS = 3
_INCREASE_DECIMALS = 3
_AGREEMENT_DECIMALS = 2
_BLOCK = 1 << 22  # float64 values that are held at once
_BELOW_ROUNDING = 0.0001  # the smallest divergence that `rounded` tells from none


@dataclass(frozen=True)
class Bounds:
    """Divergences in nats per token; the increase of perplexity as a fraction. At a bound is still good."""

    warn_kl: float
    fail_kl: float
    fail_perplexity_increase: float


# docs/quantization.md says where the numbers come from. float32 arithmetic has no error that these figures could show.
BOUNDS = {
    "q0f32": Bounds(_BELOW_ROUNDING, 2 * _BELOW_ROUNDING, 0.001),
    "q0": Bounds(0.001, 0.005, 0.005),
    "q8": Bounds(0.003, 0.01, 0.01),
    "q4": Bounds(0.05, 0.12, 0.1),
    "q3": Bounds(0.2, 0.4, 0.35),
}


@dataclass(frozen=True)
class Figures:
    """Means over `tokens` predicted tokens."""

    kl: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    tokens: int

    @property
    def perplexity_increase(self) -> float:
        """A fraction: 0.1 is 10 % more than the reference."""
        return self.perplexity / self.reference_perplexity - 1


def documents(text: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of each document of a text; one line end behind a separator belongs to no document.

    A document stands as in the model's training: between the special tokens that the tokenizer adds itself, or else,
    where the tokenizer has the separator as a token, between two of those.
    """
    separator = tokenizer.token_to_id(SEPARATOR)
    for document in filter(None, (part.removeprefix("\n") for part in text.split(SEPARATOR))):
        ids = tokenizer.encode(document)
        if separator is not None and ids == tokenizer.encode(document, add_special_tokens=False):
            ids = [separator, *ids, separator]
        yield ids


def windows(ids: Iterable[Sequence[int]], size: int) -> Iterator[Sequence[int]]:
    """The documents in windows of at most `size` tokens; what is too short to predict anything is left out."""
    for document in ids:
        for start in range(0, len(document), size):
            window = document[start : start + size]
            if len(window) > 1:
                yield window


def compare(
    model: LogitsOf,
    reference: LogitsOf,
    texts: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Figures:
    """`model` against `reference` on windows of token ids, one window after the other.

    Raises MlcBuildError for logits that are not finite, naming whose and where, and for a text with nothing to
    predict.
    """
    divergence = surprise = reference_surprise = 0.0
    agreed = tokens = done = 0
    total = sum(len(ids) for ids in texts)
    for number, ids in enumerate(texts):
        start = 0
        pairs = _aligned(
            _finite(model(ids), "the package's", number), _finite(reference(ids), "the reference's", number)
        )
        for q_logits, p_logits in pairs:
            following = np.asarray(ids[start + 1 : start + 1 + len(q_logits)], np.int64)
            rows = len(following)  # the last token's row predicts nothing that is known
            q, p = _log_softmax(q_logits[:rows]), _log_softmax(p_logits[:rows])
            divergence += float((np.exp(p) * (p - q)).sum())
            agreed += int((q.argmax(axis=-1) == p.argmax(axis=-1)).sum())
            at = np.arange(rows)
            surprise -= float(q[at, following].sum())
            reference_surprise -= float(p[at, following].sum())
            tokens += rows
            start += len(q_logits)
        done += len(ids)
        progress(done, total)
    if not tokens:
        raise MlcBuildError("the evaluation text has no document of two tokens or more: nothing to evaluate on")
    return Figures(
        kl=divergence / tokens,
        top1_agreement=agreed / tokens,
        perplexity=_perplexity(surprise / tokens),
        reference_perplexity=_perplexity(reference_surprise / tokens),
        tokens=tokens,
    )


def rounded(figures: Figures) -> dict[str, float | int]:
    """As they are published and judged."""
    return {
        "kl": _round(figures.kl, _KL_DIGITS, _KL_FINEST),
        "top1_agreement": _round(figures.top1_agreement, decimals=_AGREEMENT_DECIMALS),
        "perplexity": _round(figures.perplexity, _PERPLEXITY_DIGITS),
        "reference_perplexity": _round(figures.reference_perplexity, _PERPLEXITY_DIGITS),
        "perplexity_increase": _round(figures.perplexity_increase, decimals=_INCREASE_DECIMALS),
        "tokens": figures.tokens,
    }


def bounds(kind: str, model_dtype: str, kl: float | None = None, perplexity_increase: float | None = None) -> Bounds:
    """The bounds of a quantization class, with the model's own in their place where it has some.

    A model's own bound on the divergence warns of nothing below it: whoever set it knows the model.
    """
    common = BOUNDS["q0f32" if (kind, model_dtype) == ("q0", "float32") else kind]
    return Bounds(
        common.warn_kl if kl is None else kl,
        common.fail_kl if kl is None else kl,
        common.fail_perplexity_increase if perplexity_increase is None else perplexity_increase,
    )


def judge(figures: Mapping[str, float], limits: Bounds) -> tuple[str, list[str]]:
    """("passed" | "warned" | "failed", what is beyond which bound), for rounded figures."""
    kl, increase = figures["kl"], figures["perplexity_increase"]
    failures = []
    if kl > limits.fail_kl:
        failures.append(f"KL divergence {kl:g} nats per token is above {limits.fail_kl:g}")
    if increase > limits.fail_perplexity_increase:
        failures.append(f"perplexity rises by {increase:.1%}, more than {limits.fail_perplexity_increase:.1%}")
    if failures:
        return "failed", failures
    if kl > limits.warn_kl:
        return "warned", [f"KL divergence {kl:g} nats per token is above {limits.warn_kl:g}, where a closer look pays"]
    return "passed", []


def advice(figures: Mapping[str, float | int], limits: Bounds) -> str:
    """What a user is told of a package that missed a bound."""
    return (
        f"KL divergence {figures['kl']:g} (at most {limits.fail_kl:g}), "
        f"perplexity {figures['perplexity']:g} against {figures['reference_perplexity']:g} unquantized "
        f"({figures['perplexity_increase']:+.1%}, at most {limits.fail_perplexity_increase:+.1%}), "
        f"same likeliest token {figures['top1_agreement']:.0%}, over {figures['tokens']} tokens.\n"
        "Use a finer quantization, or, where this is right for the model, say so in its YAML file: "
        "`verify: {kl: ...}` for other bounds, `verify: {gate: report}` to record a miss only"
    )


def _perplexity(surprise: float) -> float:
    """exp, without an overflow for a model that is wrong altogether."""
    return math.exp(min(surprise, 700.0))


def _round(value: float, digits: int | None = None, decimals: int | None = None) -> float:
    """To `digits` significant digits and at most `decimals` decimals; never -0.0."""
    if digits is not None and value:
        value = float(f"{value:.{digits - 1}e}")
    if decimals is not None:
        value = round(value, decimals)
    return value + 0.0


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """float64 [rows, vocab_size]"""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _finite(pieces: Iterable[Logits], whose: str, window: int) -> Iterator[Logits]:
    """The pieces in blocks that float64 arithmetic has room for, each checked."""
    position = 0
    for piece in pieces:
        rows = max(_BLOCK // piece.shape[-1], 1)
        for block in (piece[start : start + rows] for start in range(0, len(piece), rows)):
            bad = ~np.isfinite(block).all(axis=-1)
            if bad.any():
                raise MlcBuildError(
                    f"{whose} logits are NaN or Inf: window {window} of the evaluation text, "
                    f"position {position + int(bad.argmax())}"
                )
            yield block
            position += len(block)


def _aligned(left: Iterator[Logits], right: Iterator[Logits]) -> Iterator[tuple[Logits, Logits]]:
    """Rows of both sides in pieces of equal length, whatever the pieces that each side comes in."""
    a = b = np.zeros((0, 0), np.float32)
    while True:
        a = a if len(a) else next(left, a)
        b = b if len(b) else next(right, b)
        rows = min(len(a), len(b))
        if not rows:
            return
        yield a[:rows], b[:rows]
        a, b = a[rows:], b[rows:]
