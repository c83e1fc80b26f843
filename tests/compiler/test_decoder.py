"""Compiled decoders against transformers: every position, every entry point, every shape that could go wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.compiler.built import Built, error
from tests.support import llama

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 320, 150)]

# What each shape would break.
SHAPES: dict[str, dict[str, Any]] = {
    "grouped_query": {},
    "tied": {"tie_word_embeddings": True},
    "multi_head": {"num_key_value_heads": 4},
    "multi_query_one_head": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64},
    "odd_sizes": {"hidden_size": 88, "num_attention_heads": 4, "head_dim": 22, "intermediate_size": 104},
    "wide_heads": {"head_dim": 48},
    "llama3_rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


QUICK = {"grouped_query", "odd_sizes", "llama3_rope"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in SHAPES],
)
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp(request.param), "q0f32", SHAPES[request.param])


def test_every_position_of_a_prefill(exact: Built) -> None:
    session = exact.session()
    got = np.concatenate(list(session.all_logits(session.add(), IDS)))  # 150 tokens: more than one chunk of 100
    assert error(got, exact.expected(IDS)) < 1e-4


def test_prefill_then_decode(exact: Built) -> None:
    session, expected = exact.session(), exact.expected(IDS[:80])
    sequence = session.add()
    assert error(session.prefill(sequence, IDS[:37]), expected[36]) < 1e-4
    for position in range(37, 80):
        assert error(session.decode(sequence, IDS[position]), expected[position]) < 1e-4


def test_batches_of_sequences_of_different_lengths(exact: Built) -> None:
    session = exact.session(3)
    parts = [IDS[:9], IDS[20:60], IDS[70:71]]
    expected = [exact.expected([*part, *IDS[100:104]]) for part in parts]
    sequences = [session.add() for _ in parts]
    got = session.batch_prefill(sequences, parts)
    for row, part, logits in zip(got, parts, expected, strict=True):
        assert error(row, logits[len(part) - 1]) < 1e-4
    for step in range(4):
        got = session.batch_decode(sequences, [IDS[100 + step]] * 3)
        for row, part, logits in zip(got, parts, expected, strict=True):
            assert error(row, logits[len(part) + step]) < 1e-4


@pytest.fixture(scope="module", params=["q4f32_1", "q4f16_1", "q0f16"])
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Built]:
    changes = {"hidden_size": 88, "num_attention_heads": 4, "head_dim": 22, "initializer_range": 0.05}
    return request.param, Built(tmp_path_factory.mktemp(request.param), request.param, changes, target=llama.CPU)


@pytest.mark.slow
def test_a_quantized_library_computes_what_its_weights_stand_for(rounded: tuple[str, Built]) -> None:
    """float16 formats hand embeddings and keys over in float16: that much rounding is the format's own."""
    name, built = rounded
    session = built.session()
    sequence = session.add()
    expected = built.expected(IDS[:120])
    got = np.concatenate(list(session.all_logits(sequence, IDS[:100])))
    got = np.concatenate([got, [session.decode(sequence, token) for token in IDS[100:120]]])
    print(name, error(got, expected), float(np.abs(got - expected).mean() / expected.std()))
    assert error(got, expected) < (1e-4 if "f32" in name else 5e-3)
    assert np.abs(got - expected).mean() / expected.std() < 1e-3


def test_one_library_serves_every_vocabulary(exact: Built) -> None:
    """The vocabulary is symbolic: the same structure with more tokens has the same library."""
    model = llama.transformers_llama(vocab_size=400)
    assert llama.structure_of(model).digest == llama.structure_of(llama.transformers_llama()).digest
