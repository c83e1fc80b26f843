"""How far a quantized model is from its reference, over a text.

Per position that predicts a token of the text, with p the reference's and q the model's distribution:
KL divergence sum(p (log p - log q)) in nats, whether both have the same likeliest token, and the surprise -log of the
token that came, whose mean's exponential is the perplexity. Beside them stands the perplexity of a model that knows
nothing but how often each token comes in this very text (order 0): a reference that is no better knows nothing.

Arithmetic. Over a vocabulary of 262,144 tokens a softmax in float64 takes longer than the models do. So what is done
to every logit is float32, and all that follows float64. With u = 2^-24 and t = max - logit: t is off by t u, exp by
3 units in the last place (6 u), a sum by 30 u (NumPy adds blocks of 128 by eights, then pairwise: 16 + 3 + 11 roundings
for 2^18 terms). The mean of t under its own softmax is at most log V. Hence a position's divergence is off by at most
`error_bound`: 7e-5 nats for 2^18 tokens, a tenth of which was never seen, and the mean of many by less.

Rounding. `quality.json` shall be the same file on every machine, but float32 kernels of two CPUs add in different
orders and differ by about 1e-6 of a logit, float16 ones by 1e-3. No rounding is safe against a figure that lies at a
boundary; coarse ones make that unlikely. Two digits of the divergence (not finer than 1e-4, where a float16 model's
own noise is), three of a perplexity, 0.1 % of its increase and 1 % of agreement change with a chance of about 1e-4 per
figure between float32 libraries, and of a few percent between float16 ones. Two runs of the same library on the same
text are equal whatever the rounding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import threads
from mlcbuild.runtime.tokenizer import Tokenizer

SEPARATOR = "<|endoftext|>"  # between the documents of an evaluation text
WINDOW = 1024  # tokens that are evaluated with one another at most; longer documents are cut

Logits = npt.NDArray[np.float32]
LogitsOf = Callable[[Sequence[int]], Iterable[Logits]]  # ids [n] -> pieces whose rows are [n, vocab_size]

_KL_DIGITS, _KL_FINEST = 2, 4  # significant digits, and decimals that are never exceeded
_PERPLEXITY_DIGITS = 3
_INCREASE_DECIMALS = 3
_AGREEMENT_DECIMALS = 2
_BLOCK = 1 << 18  # logits of a side that one thread looks at at once: what fits into a core's cache
_UNIT = 2.0**-24  # of float32's rounding


class NotFinite(MlcBuildError):
    """NaN or Inf where there should be numbers; the text says whose and where."""


@dataclass(frozen=True)
class Figures:
    """Means over `tokens` predicted tokens."""

    kl: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    unigram_perplexity: float
    tokens: int

    @property
    def perplexity_increase(self) -> float:
        """A fraction: 0.1 is 10 % more than the reference."""
        return self.perplexity / self.reference_perplexity - 1


def read_text(path: Path) -> str:
    """An evaluation or calibration text. Raises MlcBuildError where it is not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MlcBuildError(
            f"{path}, line {line}: not UTF-8 (byte {data[error.start]:#04x}): save the text as UTF-8"
        ) from None


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
    sums, came = np.zeros(4), Counter[int]()
    done, total = 0, sum(len(ids) for ids in texts)
    count = threads.choose()
    with ThreadPoolExecutor(count) as pool:
        for number, ids in enumerate(texts):
            start = 0
            for q, p in _aligned(iter(model(ids)), iter(reference(ids))):
                known = np.asarray(ids[start + 1 : start + 1 + len(q)], np.int64)
                following = np.append(known, np.zeros(len(q) - len(known), np.int64))
                step = -(-len(q) // count)
                cuts = [slice(at, at + step) for at in range(0, len(q), step)]
                made = pool.map(_rows, *([side[cut] for cut in cuts] for side in (q, p, following)))
                rows = np.concatenate(list(made), axis=1)
                if not np.isfinite(rows).all():
                    _refuse(q, p, number, start)
                sums += rows[:, : len(known)].sum(axis=1)  # the last token's row predicts nothing that is known
                start += len(q)
            came.update(ids[1:])
            done += len(ids)
            progress(done, total)
    tokens = came.total()
    if not tokens:
        raise MlcBuildError("the evaluation text has no document of two tokens or more: nothing to evaluate on")
    divergence, agreed, surprise, reference_surprise = (float(each) / tokens for each in sums)
    return Figures(
        kl=divergence,
        top1_agreement=agreed,
        perplexity=_perplexity(surprise),
        reference_perplexity=_perplexity(reference_surprise),
        unigram_perplexity=_perplexity(-sum(n * math.log(n / tokens) for n in came.values()) / tokens),
        tokens=tokens,
    )


def error_bound(vocab_size: int, kl: float = 0.0) -> float:
    """Nats by which float32 arithmetic can change the divergence of a position (see above)."""
    return _UNIT * (100 + 90 * math.log(vocab_size) + 42 * kl)


def rounded(figures: Figures) -> dict[str, float | int]:
    """As they are published and judged."""
    return {
        "kl": _round(figures.kl, _KL_DIGITS, _KL_FINEST),
        "top1_agreement": _round(figures.top1_agreement, decimals=_AGREEMENT_DECIMALS),
        "perplexity": _round(figures.perplexity, _PERPLEXITY_DIGITS),
        "reference_perplexity": _round(figures.reference_perplexity, _PERPLEXITY_DIGITS),
        "unigram_perplexity": _round(figures.unigram_perplexity, _PERPLEXITY_DIGITS),
        "perplexity_increase": _round(figures.perplexity_increase, decimals=_INCREASE_DECIMALS),
        "tokens": figures.tokens,
    }


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


def _rows(q_logits: Logits, p_logits: Logits, following: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """float64 [4, rows]: divergence, agreement, surprise of q and of p at the tokens that follow.

    Not finite where a logit is not.
    """
    found, step = np.empty((4, len(following))), max(_BLOCK // q_logits.shape[-1], 1)
    scratch = np.empty((3, step, q_logits.shape[-1]), np.float32)  # once: fresh pages cost more than the arithmetic
    for at in range(0, len(following), step):
        cut = slice(at, at + step)
        found[:, cut] = _block(q_logits[cut], p_logits[cut], following[cut], scratch)
    return found


def _block(
    q_logits: Logits, p_logits: Logits, following: npt.NDArray[np.int64], scratch: Logits
) -> npt.NDArray[np.float64]:
    at = np.arange(len(following))
    q, p, weights = scratch[:, : len(following)]
    q_best, p_best = q_logits.argmax(axis=-1), p_logits.argmax(axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        np.subtract(q_logits, q_logits[at, q_best, None], out=q)
        np.subtract(p_logits, p_logits[at, p_best, None], out=p)
        q_came, p_came = q[at, following].astype(np.float64), p[at, following].astype(np.float64)
        np.exp(p, out=weights)
        p -= q
        p *= weights
        crossed = p.sum(axis=-1).astype(np.float64)
        p_sum, q_sum = (each.sum(axis=-1).astype(np.float64) for each in (weights, np.exp(q, out=q)))
    p_log, q_log = np.log(p_sum), np.log(q_sum)
    return np.stack([crossed / p_sum - p_log + q_log, q_best == p_best, q_log - q_came, p_log - p_came])


def _refuse(q: Logits, p: Logits, window: int, start: int) -> None:
    """Raises NotFinite where a logit of these rows is not."""
    for whose, logits in (("the package's", q), ("the reference's", p)):
        bad = ~np.isfinite(logits).all(axis=-1)
        if bad.any():
            position = start + int(bad.argmax())
            raise NotFinite(
                f"{whose} logits are NaN or Inf: window {window} of the evaluation text, position {position}"
            )
    raise NotFinite(f"logits of 1e30 and more: window {window} of the evaluation text")


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
