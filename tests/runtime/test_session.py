"""Logits: the same numbers as transformers, whichever of the library's functions computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import Model
from mlcbuild.runtime.library import Library

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 300, 70)]


def expected(reference: Any, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """transformers' logits at every position: float32 [n, vocab_size]"""
    import torch

    with torch.no_grad():
        logits: npt.NDArray[np.float32] = reference(torch.tensor([list(ids)])).logits[0].numpy()
    return logits


def assert_close(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> None:
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-5 * theirs.std()


def test_logits_at_every_position(tiny: Model, reference: Any) -> None:
    """70 tokens are three prefill chunks of this library."""
    assert_close(tiny.logits(IDS), expected(reference, IDS))
    assert tiny.logits([]).shape == (0, tiny.vocab_size)


def test_prefill_then_decode(tiny: Model, reference: Any) -> None:
    theirs = expected(reference, IDS)
    session = tiny.session()
    sequence = session.add()
    assert_close(session.prefill(sequence, IDS[:50]), theirs[49])
    for at in range(50, 55):
        assert_close(session.decode(sequence, IDS[at]), theirs[at])
    assert session.lengths == {sequence: 55}


def test_several_sequences_at_once(tiny: Model, reference: Any) -> None:
    """The second sequence is longer than a prefill chunk, and all three together are two chunks."""
    texts = [IDS[:5], IDS[5:45], IDS[45:48]]
    session = tiny.session(max_sequences=3)
    sequences = [session.add() for _ in texts]
    logits = session.batch_prefill(sequences, texts)
    assert_close(logits, np.stack([expected(reference, ids)[-1] for ids in texts]))
    logits = session.batch_decode([sequences[2], sequences[0]], [7, 8])
    assert_close(logits, np.stack([expected(reference, [*texts[2], 7])[-1], expected(reference, [*texts[0], 8])[-1]]))


def test_a_removed_sequence_leaves_room(tiny: Model, reference: Any) -> None:
    session = tiny.session(max_sequences=2)
    first, second = session.add(), session.add()
    session.batch_prefill([first, second], [IDS[:20], IDS[20:40]])
    with pytest.raises(MlcBuildError, match="this session holds 2 sequences"):
        session.add()
    session.remove(first)
    third = session.add()
    assert_close(session.prefill(third, IDS[:9]), expected(reference, IDS[:9])[-1])
    assert_close(session.decode(second, 1), expected(reference, [*IDS[20:40], 1])[-1])


def test_a_sequence_goes_back_to_where_it_was(tiny: Model, reference: Any) -> None:
    """In the middle of a page, to the beginning, and not forward."""
    session = tiny.session()
    sequence = session.add()
    session.prefill(sequence, IDS[:40])
    assert session.truncate(sequence, 25) == 25 == session.lengths[sequence]
    assert_close(session.decode(sequence, 7), expected(reference, [*IDS[:25], 7])[-1])
    assert session.truncate(sequence, 99) == 26
    assert session.truncate(sequence, 0) == 0
    assert_close(session.prefill(sequence, IDS[5:9]), expected(reference, IDS[5:9])[-1])


@pytest.mark.parametrize("missing", ["batch_verify", "prefill", "decode"])
def test_libraries_with_fewer_functions(
    tiny: Model, reference: Any, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """The contract asks for `prefill` or `batch_prefill`, `decode` or `batch_decode`; `batch_verify` is an extra."""
    monkeypatch.setattr(Library, "has", lambda self, name: name != missing)
    theirs = expected(reference, IDS[:40])
    assert_close(tiny.logits(IDS[:40]), theirs)
    session = tiny.session()
    sequence = session.add()
    assert_close(session.prefill(sequence, IDS[:39]), theirs[38])
    assert_close(session.decode(sequence, IDS[39]), theirs[39])


def test_what_does_not_fit_is_said(tiny: Model) -> None:
    with pytest.raises(MlcBuildError, match="97 tokens do not fit into this library's context of 96"):
        tiny.logits([1] * 97)
    with pytest.raises(MlcBuildError, match="compiled for at most 3 sequences at once, not 4"):
        tiny.session(max_sequences=4)
    session = tiny.session(length=16)
    sequence = session.add()
    with pytest.raises(MlcBuildError, match="would be 17 tokens long; this session has room for 16"):
        session.prefill(sequence, [1] * 17)
    with pytest.raises(MlcBuildError, match="no tokens: a model needs at least one"):
        session.prefill(sequence, [])
    with pytest.raises(MlcBuildError, match="sequence 7 is not in this session"):
        session.decode(7, 1)


@pytest.mark.parametrize("token", [-1, 300])
def test_ids_outside_the_vocabulary(tiny: Model, token: int) -> None:
    """The kernel itself would read other memory and answer with noise, or crash."""
    with pytest.raises(MlcBuildError, match=f"token id {token} is not in this model's vocabulary of 300"):
        tiny.logits([1, token])
