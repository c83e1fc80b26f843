"""Every path that a number of tokens can take through the kernels: lengths 1 to 600, batches of 1 to 8."""

from __future__ import annotations

import numpy as np
import pytest

from tests.compiler.built import Built, error

pytestmark = pytest.mark.slow

VOCABULARY = 50277  # a multiple of no register
IDS = [int(i) for i in np.random.default_rng(0).integers(0, VOCABULARY, 600)]
# Where a kernel takes another way: dot products, panels of 12, 4 and 1, one or several tasks, tiles of 512 tokens.
LENGTHS = (1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 23, 24, 25, 47, 49, 96, 100, 511, 512, 513, 527, 528, 529, 600)


@pytest.fixture(scope="module", params=["q4f32_1", "q0f32"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    changes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 88,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 22,
        "intermediate_size": 104,
        "max_position_embeddings": 640,
    }
    return Built(tmp_path_factory.mktemp(request.param), request.param, changes, prefill_chunk_size=640)


def test_prompts_of_any_length(built: Built) -> None:
    expected = built.expected(IDS)
    session = built.session()
    for length in LENGTHS:
        sequence = session.add()
        assert error(session.prefill(sequence, IDS[:length]), expected[length - 1]) < 1e-4
        session.remove(sequence)


def test_batches_of_any_size(built: Built) -> None:
    lengths = [3, 40, 1, 17, 9, 64, 16, 33]
    expected = built.expected(IDS[:80])
    for size in range(1, 9):
        session = built.session(size)
        sequences = [session.add() for _ in range(size)]
        got = session.batch_prefill(sequences, [IDS[:length] for length in lengths[:size]])
        assert error(got, expected[[length - 1 for length in lengths[:size]]]) < 1e-4
        for step in range(2):
            got = session.batch_decode(sequences, [IDS[length + step] for length in lengths[:size]])
            assert error(got, expected[[length + step for length in lengths[:size]]]) < 1e-4
