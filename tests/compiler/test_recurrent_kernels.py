"""The recurrences' C kernels against the formulas in float64, and the encoders' attention against a softmax."""

from __future__ import annotations

import numpy as np
import pytest

from mlcbuild.compiler.cpu.attention import QUERIES
from tests.compiler import recurrences
from tests.compiler.kernels import LEVELS, LEVELS_HERE, Array, Kernels

SEQUENCES, TOKENS = 2, 7


@pytest.fixture(scope="module", params=[level for level in LEVELS_HERE if level != "x86-64-v4"])
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
    expected, weighted, weights = recurrences.wkv4(key, value, decay, bonus, a, b, m)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    scale = np.exp(after[2].astype(np.float64))
    np.testing.assert_allclose(after[0] * scale, weighted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after[1] * scale, weights, rtol=1e-4)


def test_wkv4_of_huge_keys_and_an_empty_state(kernels: Kernels) -> None:
    """exp(200) is no float32; nothing may overflow, and what was nothing must count for nothing."""
    key, value = np.full((2, 16), 200, np.float32), normal(1, 2, 16)
    zero, low = np.zeros((1, 16), np.float32), np.full((1, 16), -1e30, np.float32)
    decay, bonus = np.full(16, -0.5, np.float32), np.full(16, 1, np.float32)
    out, *after = (np.full_like(each, np.nan) for each in (key, zero, zero, zero))
    kernels("mlcbuild_wkv4", key, value, decay, bonus, zero, zero, low, out, *after, 2, 16, 64, 0)
    np.testing.assert_allclose(out[0], value[0], rtol=1e-6)
    np.testing.assert_allclose(out[1], (value[0] + np.e * value[1]) / (1 + np.e), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("heads", "groups", "keys", "dim", "each"), [(4, 2, 24, 131, False), (3, 3, 21, 20, True)])
@pytest.mark.parametrize("tokens", recurrences.LENGTHS)
def test_delta(kernels: Kernels, heads: int, groups: int, keys: int, dim: int, each: bool, tokens: int) -> None:
    """Two heads of values for one of keys; a decay for each key; columns that fill no vector, more than one task."""
    given = recurrences.delta_inputs(SEQUENCES, tokens, heads, groups, keys, dim, each)
    out, after = delta(kernels, given, groups)
    expected, held = recurrences.delta(*given, groups)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after, held, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("each", [False, True])
def test_delta_of_any_decay_and_of_a_text_in_parts(kernels: Kernels, each: bool) -> None:
    """Decays of nothing, of next to nothing and of all, next to each other; writing that turns what is there round."""
    heads, keys, dim, tokens = 2, 128, 128, 130
    x, decay, beta, state = recurrences.delta_inputs(1, tokens, heads, heads, keys, dim, each)
    decay = np.random.default_rng(4).choice(recurrences.EXTREMES, decay.shape)
    parts, held = [], state
    for part in (slice(0, 1), slice(1, 38), slice(38, tokens)):
        out, held = delta(kernels, (x[part], decay[part], 2 * beta[part], held), heads)
        parts.append(out)
    expected, after = recurrences.delta(x, decay, 2 * beta, state, heads)
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(held, after, rtol=1e-4, atol=2e-5)


def delta(kernels: Kernels, given: recurrences.Delta, groups: int) -> tuple[Array, Array]:
    """What the kernel makes of x, decays, beta and states."""
    x, decay, _, state = given
    sequences, heads, keys, dim = state.shape
    out, after = np.full((len(x), heads * dim), np.nan, np.float32), np.full_like(state, np.nan)
    sizes = (len(x) // sequences, heads, dim, groups, keys, decay.shape[2])
    for task in range(sequences * heads * -(-dim // 128)):
        kernels("mlcbuild_delta", *given, out, after, *sizes, task)
    return out, after


@pytest.mark.parametrize(("heads", "keys", "dim", "tokens"), recurrences.MLSTM)
def test_mlstm(kernels: Kernels, heads: int, keys: int, dim: int, tokens: int) -> None:
    """Columns that fill no vector, more than one task, the last alone in one; gates far apart."""
    x, gates, memory, top = recurrences.mlstm_inputs(SEQUENCES, tokens, heads, keys, dim)
    out = np.full((SEQUENCES * tokens, heads, dim + 1), np.nan, np.float32)
    after, top_after = np.full_like(memory, np.nan), np.full_like(top, np.nan)
    for task in range(SEQUENCES * heads * -(-(dim + 1) // 64)):
        kernels("mlcbuild_mlstm", x, gates, memory, top, out, after, top_after, tokens, heads, dim, keys, task, 1e-6)
    recurrences.check_mlstm((x, gates, memory, top), out, after, top_after)


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
    expected, state = recurrences.wkv(r, k, v, decay, bonus, before)
    np.testing.assert_allclose(out, expected, atol=2e-5 * dim)
    np.testing.assert_allclose(after, state, atol=1e-4)


def test_project(kernels: Kernels) -> None:
    n, groups, depth, width = 5, 5, 9, 37
    x, w = normal(0, n, groups * depth), normal(1, groups, depth, width)
    y = np.full((groups, n, width), np.nan, np.float32)
    for task in range(n * groups):
        kernels("mlcbuild_project", x, w, y, n, groups, depth, width, task)
    np.testing.assert_allclose(y, np.einsum("ngk,gkm->gnm", x.reshape(n, groups, depth), w), atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "taps", "biased", "activated"), [(7, 4, True, 1), (1, 4, False, 1), (2, 3, True, 0)]
)
def test_convolve(kernels: Kernels, tokens: int, taps: int, biased: bool, activated: int) -> None:
    """Of fewer tokens than the convolution sees, too; channels that fill no vector, more than one task."""
    width, before = 69, taps - 1
    x, w, bias = normal(0, SEQUENCES * tokens, width), normal(1, width, 1, taps), normal(2, width)
    state = normal(3, SEQUENCES, before, width)
    out, after = np.full_like(x, np.nan), np.full_like(state, np.nan)
    for task in range(SEQUENCES * 2):
        given = (x, w, bias if biased else None, state, out, after, tokens, width, taps, task, activated)
        kernels("mlcbuild_convolve", *given)
    for s in range(SEQUENCES):
        seen = np.concatenate([state[s], x[s * tokens : (s + 1) * tokens]]).astype(np.float64)
        total = sum(seen[j : j + tokens] * w[:, 0, j] for j in range(taps)) + bias * biased
        np.testing.assert_allclose(
            out[s * tokens : (s + 1) * tokens], total / (1 + np.exp(-activated * total) * activated), atol=1e-6
        )
        np.testing.assert_array_equal(after[s], seen[tokens:].astype(np.float32))


@pytest.mark.parametrize(
    ("heads", "dim", "size", "each", "tokens"),
    [(69, 1, 17, True, 7), *((6, 23, 17, False, tokens) for tokens in recurrences.LENGTHS), (3, 131, 128, False, 40)],
)
def test_scan(kernels: Kernels, heads: int, dim: int, size: int, each: bool, tokens: int) -> None:
    """Mamba's channels have rates for each value of their states, Mamba-2's heads one; groups share what goes in. Some
    states stay, some are gone at once; heads whose columns are not in tiles all at once."""
    limits = (0.001, 3.0)
    given = recurrences.scan_inputs(SEQUENCES, tokens, heads, dim, 3, size, each)
    x, before = given[0], given[-1]
    out, after = np.full_like(x, np.nan), np.full_like(before, np.nan)
    block = 64 if each else dim
    for task in range(SEQUENCES * -(-x.shape[1] // block)):
        kernels("mlcbuild_scan", *given, out, after, tokens, heads, dim, 3, size, int(each), block, task, *limits)
    expected, state = recurrences.scan(*given, limits)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(after, state, rtol=1e-5, atol=2e-5)


def test_small_steps_keep_their_digits(kernels: Kernels) -> None:
    """softplus(x) is about exp(x) far below zero, and x far above; a state that begins as 0 becomes the step itself."""
    step = np.linspace(-60, 60, 64, dtype=np.float32)
    zero, one, out = np.zeros((1, 64), np.float32), np.ones((1, 64), np.float32), np.full((1, 64), np.nan, np.float32)
    given = (one, step, zero, zero, one, one, zero, zero, out, np.empty_like(out))
    kernels("mlcbuild_scan", *given, 1, 64, 1, 1, 1, 1, 64, 0, 0.0, 1e30)
    np.testing.assert_allclose(out[0], np.logaddexp(0, step.astype(np.float64)), rtol=5e-6)


@pytest.mark.parametrize("biased", [False, True])
def test_masked_attention(kernels: Kernels, biased: bool) -> None:
    """Rows of two tasks; keys in several blocks with holes; a sequence of which nobody sees anything; MPNet's biases by
    a key's position less the query's."""
    tokens, heads, dim = 77, 2, 20
    bias = normal(2, heads, 2 * tokens - 1)
    qkv = normal(0, SEQUENCES * tokens, 3, heads, dim)
    mask = (np.random.default_rng(1).random((SEQUENCES, tokens)) > 0.4).astype(np.int32)
    mask[1] = 0
    out = np.full((SEQUENCES * tokens, heads, dim), np.nan, np.float32)
    for task in range(SEQUENCES * -(-tokens // QUERIES) * heads):
        sizes = (bias.shape[1] if biased else 0, tokens, heads, dim, QUERIES, task, dim**-0.5)
        kernels("mlcbuild_attention_masked", qkv, mask, bias if biased else None, out, *sizes)
    q, k, v = (qkv[:tokens, i].transpose(1, 0, 2).astype(np.float64) for i in range(3))
    place = np.arange(tokens)
    scores = q @ k.transpose(0, 2, 1) * dim**-0.5 + biased * bias[:, place[None] - place[:, None] + tokens - 1]
    scores = np.where(mask[0] == 1, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True)) @ v
    np.testing.assert_allclose(out[:tokens].transpose(1, 0, 2), expected, atol=1e-5)
    assert np.all(out[tokens:] == 0)
