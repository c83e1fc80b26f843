"""How far vectors are from the reference's: the figures, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.embedding import Pooling, Vectors, truncated
from mlcbuild.verify import embeddings
from mlcbuild.verify.embeddings import Bounds, HiddenStates

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
    found, problems = embeddings.judge({"cosine": cosine}, embeddings.bounds("q4", "float16"))
    assert found == status and bool(problems) == (status != "passed")


def test_a_models_own_bound_counts() -> None:
    assert embeddings.bounds("q4", "float16", 0.99) == Bounds(0.99, 0.99)
    assert embeddings.bounds("q0", "float32") == embeddings.BOUNDS["q0f32"]


def test_a_text_that_is_cut_keeps_its_end() -> None:
    assert truncated([1, 2, 3, 4, 9], 3) == [1, 2, 9]
    assert truncated([1, 2, 9], 3) == truncated([1, 2, 9], -1) == [1, 2, 9]
