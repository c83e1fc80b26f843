"""Sampling: penalties and what is left to draw from are transformers' own; draws come as often as they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.sampling import Sampler, Sampling, log_probabilities, penalised, probabilities

LOGITS = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
MANY = np.random.default_rng(3).normal(0, 3, 500).astype(np.float32)
PROMPT = [1, 4, 4, 30, 499]


def theirs(processors: list[Any], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """transformers' scores [vocab_size] after `processors`."""
    import torch

    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for processor in processors:
        scores = processor(torch.tensor([PROMPT]), scores)
    found: npt.NDArray[np.float64] = scores[0].numpy()
    return found


def softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    weights = np.exp(scores - scores.max())
    found: npt.NDArray[np.float64] = weights / weights.sum()
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_k": 5000},
        {"temperature": 2.5, "top_p": 0.4},
        {"temperature": 1.3, "min_p": 0.1},
        {"temperature": 1.8, "top_k": 60, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0.9, "top_p": 1e-9},
    ],
    ids=str,
)
def test_what_is_drawn_from_is_what_transformers_draws_from(settings: dict[str, Any]) -> None:
    from transformers.generation import logits_process

    warpers = {
        "temperature": "TemperatureLogitsWarper",
        "top_k": "TopKLogitsWarper",
        "top_p": "TopPLogitsWarper",
        "min_p": "MinPLogitsWarper",
    }
    expected = softmax(theirs([getattr(logits_process, warpers[name])(settings[name]) for name in settings], MANY))
    ours = probabilities(MANY, Sampling(**settings))
    assert ours / ours.sum() == pytest.approx(expected, abs=1e-12)
    assert (ours > 0).sum() == (expected > 0).sum()


@pytest.mark.parametrize("factor", [0.5, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(factor: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    expected = theirs([RepetitionPenaltyLogitsProcessor(factor)], MANY)
    ours = penalised(MANY, Sampling(repetition_penalty=factor), {*PROMPT, 100_000}, {})  # one is of another vocabulary
    assert ours == pytest.approx(expected, rel=1e-6)


def test_presence_and_frequency_are_of_the_text_alone() -> None:
    """As OpenAI's interface defines them: logits - count * frequency - (count > 0) * presence."""
    counts = np.zeros(500)
    counts[[7, 8]] = 3, 1
    settings = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: -100})
    ours = penalised(MANY, settings, {*PROMPT, 7, 8}, {7: 3, 8: 1})
    bias = np.where(np.arange(500) == 9, -100, 0)
    assert ours == pytest.approx(MANY - counts * 0.25 - (counts > 0) * 0.5 + bias)


def test_penalties_count_what_is_written() -> None:
    """Tokens 1 and 3 take turns: what was written last is weaker by one more count."""
    sampler = Sampler(Sampling(frequency_penalty=0.8), [])
    assert [sampler.choose(LOGITS) for _ in range(4)] == [1, 3, 1, 2]


def test_log_probabilities_are_those_of_torch() -> None:
    import torch

    assert log_probabilities(MANY) == pytest.approx(torch.from_numpy(MANY).double().log_softmax(0).numpy())


def draws(count: int = 4000, **settings: float) -> list[float]:
    sampler = Sampler(Sampling(seed=0, **settings), [])  # type: ignore[arg-type]
    tokens = [sampler.choose(LOGITS) for _ in range(count)]
    return [tokens.count(i) / count for i in range(4)]


def test_temperature_zero_is_the_likeliest_token() -> None:
    assert draws(count=10) == [0, 1, 0, 0]


def test_temperature_one_draws_by_probability() -> None:
    assert draws(temperature=1) == pytest.approx([0.1, 0.5, 0.15, 0.25], abs=0.03)


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    """0.5 + 0.25 reaches 0.7; the others never come."""
    assert draws(temperature=1, top_p=0.7) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)


def test_a_temperature_next_to_zero_is_no_overflow() -> None:
    assert draws(temperature=1e-300, count=10) == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1}, "temperature is -1: expected 0 (the likeliest token) or more"),
        ({"temperature": float("nan")}, "temperature is nan: expected 0"),
        ({"top_p": 0}, "top_p is 0: expected a number above 0, up to 1"),
        ({"top_k": -1}, "top_k is -1: expected 0 (all tokens) or more"),
        ({"min_p": 1.5}, "min_p is 1.5: expected a number from 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: expected a number above 0 (1: none)"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf: expected a number (0: none)"),
        ({"seed": -1}, "seed is -1: expected 0 or more"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(MlcBuildError) as error:
        Sampling(**settings)
    assert str(error.value).startswith(said)
