"""Where a matrix is moved to before it is rounded: against NumPy, and on text that was not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.quantization.correction import moved
from mlcbuild.quantization.feedback import Gram, Kernels
from mlcbuild.recipes.types import Weights

WEIGHTS = Weights(3, 40, "uint32", "NK", True)
K = 150  # filled up to 160, of which the second and third panel are partial
Matrix = npt.NDArray[Any]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(tmp_path_factory.mktemp("kernels"), threads=2)


def halves(kernels: Kernels, given: list[tuple[Matrix, Matrix]]) -> tuple[Gram, Gram]:
    one, other = (Gram(kernels, K, WEIGHTS) for _ in given)
    for gram, (z, x) in zip((one, other), given, strict=True):
        gram.add(z, x)
    return one, other


def text(seed: int, noise: Matrix | float, tokens: int = 900) -> tuple[Matrix, Matrix]:
    """What a matrix is given, z, and what it should be, x: a part of the difference follows from z."""
    random = np.random.default_rng(seed)
    z = random.standard_normal((tokens, K)) * np.exp(np.linspace(-1, 1, K))
    x = z @ (np.eye(K) + noise) + 0.02 * random.standard_normal((tokens, K))
    return z.astype(np.float32), x.astype(np.float32)


def test_what_follows_from_the_inputs_is_made_good(kernels: Kernels) -> None:
    random = np.random.default_rng(0)
    w = random.standard_normal((300, K)).astype(np.float32)
    noise = 0.02 * random.standard_normal((K, K))
    given = [text(seed, noise) for seed in (1, 2)]
    found = moved(kernels, w, halves(kernels, given))
    z, x = (np.concatenate(side).astype(np.float64) for side in zip(*given, strict=True))
    h = z.T @ z
    expected = w + w @ (x - z).T @ z @ np.linalg.inv(h + 0.003 * np.diag(h).mean() * np.eye(K))
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected - w).max()
    z, x = text(3, noise)
    assert np.square(z @ found.T - x @ w.T).sum() < 0.05 * np.square((z - x) @ w.T).sum()


def test_what_does_not_follow_is_left(kernels: Kernels) -> None:
    """Noise that a short text would be fitted to; and half a text that there is not."""
    w = np.random.default_rng(0).standard_normal((20, K)).astype(np.float32)
    given = [text(seed, 0.0, 200) for seed in (1, 2)]
    found = moved(kernels, w, halves(kernels, given))
    z, x = text(3, 0.0)
    assert np.square(z @ found.T - x @ w.T).sum() < 1.02 * np.square((z - x) @ w.T).sum()
    nothing = np.zeros((0, K), np.float32)
    assert moved(kernels, w, halves(kernels, [given[0], (nothing, nothing)])) is w
