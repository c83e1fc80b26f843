"""How far vectors are from the reference's: the figures, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.embedding import Pooling, Vectors, truncated
from mlcbuild.verify import embeddings, vector_bounds
from mlcbuild.verify.embeddings import HiddenStates
from mlcbuild.verify.vector_bounds import Bounds

STATES = {1: [[3.0, 0.0], [0.0, 4.0]], 2: [[1.0, 1.0]]}


def states(turned: float = 0.0) -> HiddenStates:
    """Hidden states of a document by its first token; turned by an angle."""
    turn = np.array([[np.cos(turned), np.sin(turned)], [-np.sin(turned), np.cos(turned)]])
    return lambda ids: np.asarray(np.array(STATES[ids[0]]) @ turn, np.float32)


@pytest.mark.parametrize("strategy", ["cls", "mean", "last"])
def test_the_figures_are_cosines_and_an_error(strategy: str) -> None:
    angle = 0.3
    found = embeddings.compare(states(angle), states(), Pooling(strategy, True), [[1, 9], [2]])
    assert found.cosine == pytest.approx(np.cos(angle), abs=1e-6) == found.lowest_cosine
    assert found.hidden_error == pytest.approx(2 * np.sin(angle / 2), abs=1e-6)  # the chord, as a fraction
    assert (found.texts, found.tokens) == (2, 3)
    assert embeddings.rounded(found)["cosine"] == round(float(np.cos(angle)), 4)


def test_the_lowest_cosine_is_that_of_the_worst_text() -> None:
    def model(ids: Sequence[int]) -> Vectors:
        return states(0.0 if ids[0] == 1 else 0.5)(ids)

    found = embeddings.compare(model, states(), Pooling("cls", False), [[1, 9], [2]])
    assert found.lowest_cosine == pytest.approx(np.cos(0.5), abs=1e-6)
    assert found.cosine == pytest.approx((1 + np.cos(0.5)) / 2, abs=1e-6)


def test_what_is_not_finite_is_named() -> None:
    with pytest.raises(MlcBuildError, match=r"the package's hidden states are NaN or Inf: document 0 .* position 1"):
        embeddings.compare(
            lambda ids: np.array([[1, 1], [np.nan, 1]], np.float32), states(), Pooling("cls", True), [[1]]
        )
    with pytest.raises(MlcBuildError, match="no document: nothing to evaluate on"):
        embeddings.compare(states(), states(), Pooling("cls", True), [])


@pytest.mark.parametrize(
    ("cosine", "status"), [(1.0, "passed"), (0.98, "passed"), (0.97, "warned"), (0.94, "warned"), (0.93, "failed")]
)
def test_the_verdict(cosine: float, status: str) -> None:
    found, problems = vector_bounds.judge(figures(cosine=cosine), limits("q4"))
    assert found == status and bool(problems) == (status != "passed")


def test_a_models_own_bound_counts() -> None:
    assert limits("q4", cosine=0.99) == Bounds(0.99, 0.99)
    assert limits("q0", "float32") == vector_bounds.BOUNDS["q0f32"]


def figures(**changes: float) -> dict[str, float]:
    found = {"cosine": 1.0, "lowest_cosine": 1.0, "hidden_error": 0.0, "likeness": 0.3, "texts": 9, "tokens": 500}
    return found | changes


Q4 = {"class": "q4", "model_dtype": "float16"}


def limits(kind: str, dtype: str = "float16", cosine: float | None = None) -> Bounds:
    return vector_bounds.bounds({"class": kind, "model_dtype": dtype, "cosine": cosine}, {})


def test_a_reference_that_cannot_tell_texts_apart() -> None:
    """FAULTS.md A3, of vectors: the vectors depend on nothing but the number of tokens, on both sides alike."""

    def blind(ids: Sequence[int]) -> Vectors:
        return np.cos(np.outer(np.arange(len(ids)), np.arange(1, 9))).astype(np.float32)

    found = embeddings.compare(blind, blind, Pooling("mean", True), [[1, 9, 4], [2, 8], [5, 6, 7]])
    status, problems = vector_bounds.judge(embeddings.rounded(found), limits("q4"))
    assert status == "failed"
    assert problems == ["the unquantized model itself gives all 3 texts the same vector"]
    assert "which tensor is which" in vector_bounds.advice(embeddings.rounded(found), limits("q4"), Q4)
    assert "finer quantization (`q8f16_1`)" in vector_bounds.advice(figures(cosine=0.9), limits("q4"), Q4)
    sees = embeddings.compare(states(), states(), Pooling("cls", True), [[1, 9], [2], [1, 3]])
    assert sees.likeness == pytest.approx(0.5**0.5)
    assert vector_bounds.judge(figures(texts=1), limits("q4"))[0] == "failed"


def test_a_text_that_is_cut_keeps_its_end() -> None:
    assert truncated([1, 2, 3, 4, 9], 3) == [1, 2, 9]
    assert truncated([1, 2, 9], 3) == truncated([1, 2, 9], -1) == [1, 2, 9]
