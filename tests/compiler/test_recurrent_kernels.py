"""The recurrences' C kernels against the formulas in float64, and the encoders' attention against a softmax."""

from __future__ import annotations

import numpy as np
import pytest

from mlcbuild.compiler.cpu.attention import QUERIES
from tests.compiler.kernels import LEVELS, Array, Kernels

SEQUENCES, TOKENS = 2, 7


@pytest.fixture(scope="module", params=["native", "x86-64-v3"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(LEVELS[request.param], tmp_path_factory.mktemp("kernels"), "float32")


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("width", [133, 64, 5])
def test_wkv4(kernels: Kernels, width: int) -> None:
    """The sums as they are, without an exponent kept apart; channels that fill no vector, more than one task."""
    rows = SEQUENCES * TOKENS
    key, value = 3 * normal(0, rows, width), normal(1, rows, width)
    decay, bonus = -np.exp(normal(2, width)), normal(3, width)
    a, b, m = normal(4, SEQUENCES, width), np.exp(normal(5, SEQUENCES, width)), normal(6, SEQUENCES, width)
    out, *after = (np.full_like(each, np.nan) for each in (key, a, b, m))
    for task in range(SEQUENCES * -(-width // 64)):
        kernels("mlcbuild_wkv4", key, value, decay, bonus, a, b, m, out, *after, TOKENS, width, 64, task)
    for s in range(SEQUENCES):
        weighted, weights = (x[s] * np.exp(m[s].astype(np.float64)) for x in (a, b))
        for t in range(s * TOKENS, (s + 1) * TOKENS):
            now = np.exp(bonus + key[t].astype(np.float64))
            np.testing.assert_allclose(out[t], (weighted + now * value[t]) / (weights + now), rtol=1e-4, atol=1e-5)
            weighted = weighted * np.exp(decay) + np.exp(key[t].astype(np.float64)) * value[t]
            weights = weights * np.exp(decay) + np.exp(key[t].astype(np.float64))
        scale = np.exp(after[2][s].astype(np.float64))
        np.testing.assert_allclose(after[0][s] * scale, weighted, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(after[1][s] * scale, weights, rtol=1e-4)


def test_wkv4_of_huge_keys_and_an_empty_state(kernels: Kernels) -> None:
    """exp(200) is no float32; nothing may overflow, and what was nothing must count for nothing."""
    key, value = np.full((2, 16), 200, np.float32), normal(1, 2, 16)
    zero, low = np.zeros((1, 16), np.float32), np.full((1, 16), -1e30, np.float32)
    decay, bonus = np.full(16, -0.5, np.float32), np.full(16, 1, np.float32)
    out, *after = (np.full_like(each, np.nan) for each in (key, zero, zero, zero))
    kernels("mlcbuild_wkv4", key, value, decay, bonus, zero, zero, low, out, *after, 2, 16, 64, 0)
    np.testing.assert_allclose(out[0], value[0], rtol=1e-6)
    np.testing.assert_allclose(out[1], (value[0] + np.e * value[1]) / (1 + np.e), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [64, 20])
@pytest.mark.parametrize("varies", [False, True])
def test_wkv(kernels: Kernels, dim: int, varies: bool) -> None:
    """RWKV-5's decay is one for all tokens, RWKV-6's each token's own."""
    heads, rows = 3, SEQUENCES * TOKENS
    width = heads * dim
    r, k, v = (normal(seed, rows, width) for seed in range(3))
    decay = 1 / (1 + np.exp(normal(3, rows if varies else 1, width)))
    bonus, before = normal(4, width), normal(5, SEQUENCES, heads, dim, dim)
    out, after = np.full((rows, width), np.nan, np.float32), np.full_like(before, np.nan)
    stride = width if varies else 0
    for task in range(SEQUENCES * heads):
        kernels("mlcbuild_wkv", r, k, v, decay, bonus, before, out, after, TOKENS, heads, dim, stride, task)
    for s in range(SEQUENCES):
        state = before[s].astype(np.float64)
        for t in range(s * TOKENS, (s + 1) * TOKENS):
            row, column = r[t].reshape(heads, 1, dim), k[t].reshape(heads, 1, dim)
            new = v[t].reshape(heads, dim, 1).astype(np.float64) * column
            expected = ((state + bonus.reshape(heads, 1, dim) * new) * row).sum(-1)
            np.testing.assert_allclose(out[t], expected.ravel(), atol=2e-5 * dim)
            state = state * decay[t if varies else 0].reshape(heads, 1, dim) + new
        np.testing.assert_allclose(after[s], state, atol=1e-4)


def test_project(kernels: Kernels) -> None:
    n, groups, depth, width = 5, 5, 9, 37
    x, w = normal(0, n, groups * depth), normal(1, groups, depth, width)
    y = np.full((groups, n, width), np.nan, np.float32)
    for task in range(n * groups):
        kernels("mlcbuild_project", x, w, y, n, groups, depth, width, task)
    np.testing.assert_allclose(y, np.einsum("ngk,gkm->gnm", x.reshape(n, groups, depth), w), atol=1e-5)


def test_masked_attention(kernels: Kernels) -> None:
    """Rows of two tasks; keys in several blocks with holes; a sequence of which nobody sees anything."""
    tokens, heads, dim = 77, 2, 20
    qkv = normal(0, SEQUENCES * tokens, 3, heads, dim)
    mask = (np.random.default_rng(1).random((SEQUENCES, tokens)) > 0.4).astype(np.int32)
    mask[1] = 0
    out = np.full((SEQUENCES * tokens, heads, dim), np.nan, np.float32)
    for task in range(SEQUENCES * -(-tokens // QUERIES) * heads):
        sizes = (tokens, heads, dim, QUERIES, task, dim**-0.5)
        kernels("mlcbuild_attention_masked", qkv, mask, out, *sizes)
    q, k, v = (qkv[:tokens, i].transpose(1, 0, 2).astype(np.float64) for i in range(3))
    scores = np.where(mask[0] == 1, q @ k.transpose(0, 2, 1) * dim**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True)) @ v
    np.testing.assert_allclose(out[:tokens].transpose(1, 0, 2), expected, atol=1e-5)
    assert np.all(out[tokens:] == 0)
