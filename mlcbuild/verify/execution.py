"""A library on its device against the CPU's library of the same structure, over random weights and a few tokens."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
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
from mlcbuild.verify import engine_calls

VOCABULARY = 520  # tokens: the head's kernel takes any number; no multiple of a tile
# Of the CPU's logits' deviation, what a model dtype may be off by: its precision times a few operations.
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}
# Times that, by the kind of layer: a scan multiplies what four products gave, and their errors add up; of a delta net,
# what a head gives is normed, and it is small where a query and what was written point elsewhere; so is what a matrix
# memory gives, in fewer steps, and the difference of two attentions: with half of the second taken off, errors are
# (1 + 1/2) / (1 - 1/2) times as large beside it.
# Latents that are made longer make scores as much larger, and what rounding does to them.
_NOISE = {"mamba": 2, "mamba2": 2, "lightning": 2, "mlstm": 3, "delta": 5, "kda": 5}
_NOISE_OF_DIFFERENCES, _NOISE_OF_LONG_LATENTS = 3, 2
_MANY_PRODUCTS = 20_000_000  # for a row of activations: above, one takes an emulated device seconds
_FEW_PRODUCTS = 3_000_000  # up to here, hundreds of rows take it seconds
_LONG = 272  # tokens: of one text, 17 pages
_HEAD = "head, "  # how names of calls begin that ask for the head alone
_KEPT = 20  # tokens of a text that another begins with: some pages and a part
_HEAD_ROWS = (20, 40, 70)  # the head's kernels of more rows than there are texts; CUDA's large blocks begin at 65


@dataclass(frozen=True)
class Texts:
    """How many tokens are tried: of one text `first`, then `more` onto it, then `steps` one by one; then two texts.

    Together they reach every kernel of a product (compiler/gpu/schedules.FEW): of one row, a few, up to 32, and many.
    `long`: of a text whose keys decoding splits into parts (compiler/gpu/cuda_attention.py), and for whose rows CUDA
    has large blocks (compiler/gpu/cuda_many.py); 0 where there is no time.
    """

    first: int = 40
    more: int = 11
    steps: int = 3
    two: tuple[int, int] = (7, 13)
    long: int = 0


SMALL = Texts()
LONG = replace(SMALL, long=_LONG)
FEW = Texts(first=33, more=9, steps=2, two=(1, 4))  # for large matrices


def texts(structure: Structure) -> Texts:
    """What is tried on a device that is slow."""
    products = _products(structure)
    return FEW if products > _MANY_PRODUCTS else SMALL if products > _FEW_PRODUCTS else LONG


def described(structure: Structure, tried: Texts) -> dict[str, Any]:
    """What was run, for quality.json: what it is less than the whole model is said."""
    tokens = {"prefill": tried.first, "onto a history": tried.more, "decode": tried.steps, "batch": [*tried.two]}
    tokens |= {"behind a long history": tried.long} if tried.long else {}
    if structure.embedding is not None:
        names = ("prefill", "batch") if structure.kind == ENCODER else ("prefill", "onto a history")
        tokens = {name: tokens[name] for name in names}
    return {
        "layers": structure.num_hidden_layers,
        "vocabulary": VOCABULARY,
        "weights": "random",
        "tokens": tokens,
    }


def compare(
    library: Path, cpu_library: Path, folder: Path, structure: Structure, model_dtype: str, texts: Texts
) -> tuple[dict[str, float], list[str]]:
    """The largest difference of logits by what was called, over the deviation of the CPU's; of a model of texts, of
    hidden states. And the functions around the model that were compared with NumPy (engine_calls.py).

    `folder` holds the weights. Raises MlcBuildError where a number is not finite, or such a function is wrong.
    """
    records = weights.read_index(folder)
    ours, theirs = (network(each, records, folder, VOCABULARY) for each in (library, cpu_library))
    errors = {}
    hidden = {rows: _hidden(rows, structure.hidden_size) for rows in _HEAD_ROWS}
    both = (chain(_results(each, texts), _heads(each, hidden, model_dtype)) for each in (ours, theirs))
    for (name, got), (_, expected) in zip(*both, strict=True):
        if not np.isfinite(got).all():
            raise MlcBuildError(f"{name}: what comes out is not finite")
        errors[name] = _error(got, expected)
    return errors, engine_calls.run(ours.library, model_dtype)


def bound(structure: Structure, model_dtype: str) -> float:
    """What logits may be off by, of their deviation."""
    return BOUNDS[model_dtype] * noise(structure)


def noise(structure: Structure) -> int:
    """Times the bounds of other models."""
    if structure.differential:
        return _NOISE_OF_DIFFERENCES
    if structure.long_latents:
        return _NOISE_OF_LONG_LATENTS
    return _NOISE.get(structure.mixer or structure.kind, 1)


def problems(errors: Mapping[str, float], structure: Structure, model_dtype: str) -> list[str]:
    """What is further off than the model dtype explains.

    Of two experts that count nearly the same, rounding may choose either, and that token's logits are others then. So
    of a model with experts it is the median of the calls that counts, but of those that ask for the head alone.
    """
    most, what = bound(structure, model_dtype), "logits" if structure.embedding is None else "hidden states"
    heads = {name: error for name, error in errors.items() if name.startswith(_HEAD)}
    rest = [error for name, error in errors.items() if name not in heads]
    judged = {"the median of all other calls": statistics.median(rest), **heads} if structure.num_experts else errors
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
    session = Session(network, min(2, network.library.metadata.max_batch_size), max(64, 16 + texts.long))
    text = session.add()
    if not network.library.has("get_logits"):
        yield "prefill", np.concatenate(list(session.hidden_states(text, tokens(texts.first))))
        yield "prefill onto a history", np.concatenate(list(session.hidden_states(text, tokens(texts.more))))
        return
    yield "prefill", session.prefill(text, tokens(texts.first))
    yield "prefill onto a history", session.prefill(text, tokens(texts.more))
    yield "decode", np.stack([session.decode(text, token) for token in tokens(texts.steps)])
    yield "verify", np.concatenate(list(session.all_logits(text, tokens(2))))
    if session.forks:
        yield "decode behind a beginning", session.decode(session.fork(text, _KEPT), *tokens(1))
        session.truncate(text, _KEPT)
        yield "decode after steps back", session.decode(text, *tokens(1))
    for each in [*session.lengths]:
        session.remove(each)
    if texts.long:
        text = session.add()
        session.prefill(text, tokens(texts.long))
        yield "decode behind a long history", session.decode(text, *tokens(1))
        session.remove(text)
    two = [session.add() for _ in range(min(2, session.max_sequences))]
    yield "batch prefill", session.batch_prefill(two, [tokens(count) for count in texts.two[: len(two)]])
    yield "batch decode", session.batch_decode(two, tokens(len(two)))
    yield "prefill of one token", session.prefill(two[0], tokens(1))  # whose last products are not those of decoding


def _heads(network: Network, hidden: Mapping[int, Logits], model_dtype: str) -> Iterator[tuple[str, Logits]]:
    """The logits of hidden states [rows, H], by how many there are."""
    library = network.library
    for rows, states in hidden.items() if library.has("get_logits") else ():
        given = engine_calls.placed(library.device, states, model_dtype)
        logits = library["get_logits"](given, network.parameters)
        yield f"{_HEAD}{rows} rows", library.device.array(logits, (rows, VOCABULARY))


def _hidden(rows: int, width: int) -> Logits:
    return np.random.default_rng(rows).standard_normal((rows, width)).astype(np.float32)


def _error(got: Logits, expected: Logits) -> float:
    return float(np.abs(got - expected).max() / expected.std())


def _products(structure: Structure) -> int:
    return count(replace(structure, vocab_size=VOCABULARY))
