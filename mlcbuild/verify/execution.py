"""A library on its device against the CPU's library of the same structure, over random weights and a few tokens."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.kinds import ENCODER
from mlcbuild.models.parameters import count
from mlcbuild.models.structure import Structure
from mlcbuild.runtime import embedding, weights
from mlcbuild.runtime.library import Network
from mlcbuild.runtime.model import network
from mlcbuild.runtime.session import Logits, Session

VOCABULARY = 520  # tokens: the head's kernel takes any number; no multiple of a tile
# Of the CPU's logits' deviation, what a model dtype may be off by: its precision times a few operations.
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}
# Times that, by the kind of layer: a scan multiplies what four products gave, and their errors add up; of a delta net,
# what a head gives is normed, and it is small where a query and what was written point elsewhere.
_NOISE = {"mamba": 2, "mamba2": 2, "delta": 5, "kda": 5}
_MANY_PRODUCTS = 20_000_000  # for a row of activations: above, one takes an emulated device seconds


@dataclass(frozen=True)
class Texts:
    """How many tokens are tried: of one text `first`, then `more` onto it, then `steps` one by one; then two texts.

    Together they reach every kernel of a product (compiler/gpu/schedules.FEW): of one row, a few, up to 32, and many.
    (The large blocks of CUDA's products of many rows are for longer texts than a slow device can try.)
    """

    first: int = 40
    more: int = 11
    steps: int = 3
    two: tuple[int, int] = (7, 13)


SMALL = Texts()
FEW = Texts(first=33, more=9, steps=2, two=(1, 4))  # for large matrices


def texts(structure: Structure) -> Texts:
    """What is tried on a device that is slow."""
    return FEW if _products(structure) > _MANY_PRODUCTS else SMALL


def described(structure: Structure, tried: Texts) -> dict[str, Any]:
    """What was run, for quality.json: what it is less than the whole model is said."""
    tokens = {"prefill": tried.first, "onto a history": tried.more, "decode": tried.steps, "batch": [*tried.two]}
    if structure.embedding is not None:
        names = ("prefill", "batch") if structure.kind == ENCODER else ("prefill", "onto a history")
        tokens = {name: tokens[name] for name in names}
    return {
        "layers": structure.num_hidden_layers,
        "vocabulary": VOCABULARY,
        "weights": "random",
        "tokens": tokens,
    }


def compare(library: Path, cpu_library: Path, folder: Path, texts: Texts) -> dict[str, float]:
    """The largest difference of logits by what was called, over the deviation of the CPU's; of a model of texts, of
    hidden states.

    `folder` holds the weights. Raises MlcBuildError where a number is not finite.
    """
    records = weights.read_index(folder)
    ours, theirs = (network(each, records, folder, VOCABULARY) for each in (library, cpu_library))
    errors = {}
    for (name, got), (_, expected) in zip(_results(ours, texts), _results(theirs, texts), strict=True):
        if not np.isfinite(got).all():
            raise MlcBuildError(f"{name}: what comes out is not finite")
        errors[name] = _error(got, expected)
    return errors


def bound(structure: Structure, model_dtype: str) -> float:
    """What logits may be off by, of their deviation."""
    return BOUNDS[model_dtype] * _NOISE.get(structure.mixer or structure.kind, 1)


def problems(errors: Mapping[str, float], structure: Structure, model_dtype: str) -> list[str]:
    """What is further off than the model dtype explains.

    Of two experts that count nearly the same, rounding may choose either, and that token's logits are others then. So
    of a model with experts it is the median of the calls that counts.
    """
    most, what = bound(structure, model_dtype), "logits" if structure.embedding is None else "hidden states"
    judged = {"the median of all calls": statistics.median(errors.values())} if structure.num_experts else errors
    return [
        f"{name}: {what} are off by {error:.2g} of their deviation; {model_dtype} explains {most:g}"
        for name, error in judged.items()
        if not error <= most
    ]


def _results(network: Network, texts: Texts) -> Iterator[tuple[str, Logits]]:
    """The logits of each call, or hidden states, under its name."""
    random = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return [int(token) for token in random.integers(0, VOCABULARY, count)]

    if embedding.is_encoder(network.library):
        yield "one text", embedding.hidden_states(network, tokens(texts.first))
        both = np.array([tokens(max(texts.two)), tokens(max(texts.two))])
        seen = np.arange(max(texts.two)) < np.array(texts.two)[:, None]
        yield "two texts, one padded", embedding.encoded(network, both, seen)[seen]
        return
    session = Session(network, 2, 64)
    text = session.add()
    if not network.library.has("get_logits"):
        yield "prefill", np.concatenate(list(session.hidden_states(text, tokens(texts.first))))
        yield "prefill onto a history", np.concatenate(list(session.hidden_states(text, tokens(texts.more))))
        return
    yield "prefill", session.prefill(text, tokens(texts.first))
    yield "prefill onto a history", session.prefill(text, tokens(texts.more))
    yield "decode", np.stack([session.decode(text, token) for token in tokens(texts.steps)])
    session.remove(text)
    two = [session.add() for _ in range(min(2, session.max_sequences))]
    yield "batch prefill", session.batch_prefill(two, [tokens(count) for count in texts.two[: len(two)]])
    yield "batch decode", session.batch_decode(two, tokens(len(two)))


def _error(got: Logits, expected: Logits) -> float:
    return float(np.abs(got - expected).max() / expected.std())


def _products(structure: Structure) -> int:
    return count(replace(structure, vocab_size=VOCABULARY))
