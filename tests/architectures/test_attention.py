"""What each choice of attention changes: a library without it is far from the model that the case describes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mlcbuild.models.few_layers import one_layer
from mlcbuild.models.parameters import parameters
from mlcbuild.models.structure import from_library_json
from mlcbuild.runtime.session import Session
from tests.architectures import attention_cases, cases, family_cases, indexer_cases
from tests.architectures.agreement import IDS, Agreement, Array, error, network, save, structure_of
from tests.architectures.attention_cases import WITHOUT
from tests.support import llama

CASES = {**cases.CASES, **attention_cases.CASES}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({case for case, _ in WITHOUT.values()}))
def test_logits_differ_without_the_choice(name: str, tmp_path: Path) -> None:
    """Checkpoint and weights are made once for all choices of a case; only the library is another."""
    agreement = Agreement(CASES[name], "q0f32", tmp_path)
    expected = agreement.expected(IDS)
    assert error(_logits(agreement.session(), IDS), expected) < 1e-4
    for choice, (case, changes) in WITHOUT.items():
        if case != name:
            continue
        fields = {field: value for field, value in changes.items() if field != "roles"}
        rules = tuple(rule for rule in agreement.structure.rules if rule.role not in changes.get("roles", ()))
        other = dataclasses.replace(agreement.structure, rules=rules, **fields)
        library = llama.build_library(other, "q0f32", tmp_path / choice.replace(" ", "_"))
        session = Session(network(library, agreement.weights, other.vocab_size, False), 1)
        assert error(_logits(session, IDS), expected) > 1e-2, choice


def _logits(session: Session, ids: list[int]) -> Array:
    return np.concatenate(list(session.all_logits(session.add(), ids)))


@pytest.mark.slow
def test_a_batch_of_sequences_with_a_window(tmp_path: Path) -> None:
    """Two sequences of different lengths in one batch: each is as alone, whatever its window has passed."""
    agreement = Agreement(CASES["mistral-16"], "q0f32", tmp_path)
    session, other = agreement.session(2), IDS[5:28]
    a, b = session.add(), session.add()
    got = session.batch_prefill([a, b], [IDS[:12], other[:9]])
    long, short = agreement.expected(IDS), agreement.expected(other)
    assert error(got, np.stack([long[11], short[8]])) < 1e-4
    for step in range(14):
        got = session.batch_decode([a, b], [IDS[12 + step], other[9 + step]])
        assert error(got, np.stack([long[12 + step], short[9 + step]])) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantization", "bound"),
    [
        *(("minicpm3", "q0f32", 1e-4), ("minicpm3", "q4f16_1", 1e-2)),
        *(("deepseek_v32-choosing", "q0f32", 2e-5), ("hy_v4-choosing", "q0f32", 2e-5)),
    ],
)
def test_latents_of_texts_with_one_beginning(name: str, quantization: str, bound: float, tmp_path: Path) -> None:
    """A text goes on from the middle of another's, whose latents it reads; tokens are taken back, and both decode."""
    agreement = Agreement((family_cases.CASES | indexer_cases.CASES)[name], quantization, tmp_path)
    assert agreement.structure.absorbed == (name != "hy_v4-choosing")
    session, other = agreement.session(2), [*IDS[:19], *IDS[30:]]
    long, short = agreement.expected(IDS), agreement.expected(other)
    a = session.add()
    assert error(session.prefill(a, IDS[:27]), long[26]) < bound
    b = session.fork(a, 19)
    assert error(session.prefill(b, other[19:24]), short[23]) < bound
    session.truncate(a, 21)
    assert error(session.prefill(a, IDS[21:22]), long[21]) < bound
    for step in range(4):
        got = session.batch_decode([a, b], [IDS[22 + step], other[24 + step]])
        assert error(got, np.stack([long[22 + step], short[24 + step]])) < bound


def test_windows_that_change_nothing_are_none(tmp_path: Path) -> None:
    """Models whose windows are no shorter than the text share a library with those that have none."""
    for name in ("mistral-16", "gemma2-256-wide"):
        save(CASES[name], tmp_path / name)
    window = structure_of(CASES["mistral-16"], tmp_path / "mistral-16")
    assert (window.sliding_window_size, window.layer_types) == (16, None)
    short = dataclasses.replace(CASES["mistral-16"], overrides={"context_window_size": 16, "prefill_chunk_size": 16})
    assert structure_of(short, tmp_path / "mistral-16").sliding_window_size is None
    gemma = structure_of(CASES["gemma2-256-wide"], tmp_path / "gemma2-256-wide")
    assert gemma.layer_types == ("sliding", "full", "sliding")
    again = from_library_json(gemma.library_json())
    assert again.digest == gemma.digest and again.layer_types == gemma.layer_types
    assert gemma.layer_kinds == (0, 1, 0) and one_layer(gemma).layer_types == ("sliding", "full")
    assert {p.layer for p in parameters(gemma)} == {None, 0, 1, 2}
