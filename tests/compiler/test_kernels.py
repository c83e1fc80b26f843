"""The CPU kernels one by one, against NumPy in float64: odd shapes, tails, both dtypes, and what NaN does."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.compiler.kernels import LEVELS, Kernels
from tests.support.llama import pack

Array = npt.NDArray[Any]
DTYPES = ("float32", "float16")

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are built for x86-64 here")


@pytest.fixture(scope="module", params=LEVELS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(LEVELS[request.param], tmp_path_factory.mktemp("kernels"))


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(got: Array, expected: Array, dtype: str = "float32") -> None:
    scale = np.abs(expected).max()
    tolerance = 3e-6 if dtype == "float32" else 1e-3
    assert np.abs(got.astype(np.float64) - expected).max() <= tolerance * scale


TOKENS = (1, 2, 3, 5, 64, 67, 130)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (40, 21), (513, 16), (1100, 35)])
def test_a_dense_product(kernels: Kernels, dtype: str, columns: int, rows: int) -> None:
    w = normal(rows, columns, dtype=dtype, seed=1)
    padded = -(-columns // 16) * 16
    for tokens in TOKENS:
        x = normal(tokens, columns)
        packed = np.full((tokens, padded), np.nan, np.float32)
        for i in range(tokens):
            kernels("mlcbuild_pack_float32", x, packed, i, columns, padded)
        y = np.full((tokens, rows), np.nan, np.float32)
        for first in range(0, rows, 16):
            count = min(16, rows - first)
            name = f"mlcbuild_linear_{dtype}_float32"
            kernels(name, packed, w, y, tokens, rows, columns, padded, first, count)
        close(y, x.astype(np.float64) @ w.astype(np.float64).T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "rows"), [(32, 1), (88, 21), (192, 16), (1000, 35), (5632, 5)])
def test_a_product_with_4_bit_weights(kernels: Kernels, dtype: str, columns: int, rows: int) -> None:
    words, scale, values = pack(normal(rows, columns, seed=1), dtype)
    padded = -(-words.shape[1] // 16) * 16 * 8
    for tokens in TOKENS:
        x = normal(tokens, columns)
        packed = np.full((tokens, padded), np.nan, np.float32)
        for i in range(tokens):
            kernels("mlcbuild_pack_words_float32", x, packed, i, columns, padded, 8)
        y = np.full((tokens, rows), np.nan, np.float32)
        for first in range(0, rows, 16):
            sizes = (tokens, rows, words.shape[1], scale.shape[1], padded, first, min(16, rows - first))
            kernels(f"mlcbuild_linear_int4_{dtype}_float32", packed, words, scale, y, *sizes)
        close(y, x.astype(np.float64) @ values.astype(np.float64).T)


def test_float16_results_are_the_rounded_float32_ones(kernels: Kernels) -> None:
    w, x = normal(16, 64, dtype="float16"), normal(1, 64, seed=2)
    narrow, wide = np.zeros((1, 16), np.float16), np.zeros((1, 16), np.float32)
    kernels("mlcbuild_linear_float16_float16", x, w, narrow, 1, 16, 64, 64, 0, 16)
    kernels("mlcbuild_linear_float16_float32", x, w, wide, 1, 16, 64, 64, 0, 16)
    assert (narrow == wide.astype(np.float16)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 193])
def test_rms_norm(kernels: Kernels, dtype: str, width: int) -> None:
    x, w = normal(3, width), normal(width, dtype=dtype, seed=1)
    y = np.zeros_like(x)
    for row in range(3):
        kernels(f"mlcbuild_rms_norm_{dtype}", x, w, y, row, width, 1e-5)
    wide = x.astype(np.float64)
    close(y, wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * w)


@pytest.mark.parametrize("width", [1, 16, 37])
def test_gated_silu(kernels: Kernels, width: int) -> None:
    x = 20 * normal(2, 2 * width)
    x[0, 0] = -200.0  # exp overflows float32
    y = np.zeros((2, width), np.float32)
    for row in range(2):
        kernels("mlcbuild_gated_silu", x, y, row, width)
    gate, up = x.astype(np.float64)[:, :width], x.astype(np.float64)[:, width:]
    close(y, gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("width", [1, 16, 1003])
def test_softmax_with_temperature(kernels: Kernels, width: int) -> None:
    x, temperature = 30 * normal(3, width), np.array([1.0, 0.3, 0.0], np.float32)
    x[2, : min(2, width)] = 1e3  # ties share at temperature 0
    y = np.zeros_like(x)
    for row in range(3):
        kernels("mlcbuild_softmax_float32", x, temperature, y, row, width)
    for row in range(2):
        e = np.exp((x[row].astype(np.float64) - x[row].max()) / temperature[row])
        assert np.abs(y[row] - e / e.sum()).max() < 1e-6
    assert (y[2] == (x[2] == 1e3) / min(2, width)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary"), [(4, 2, 22, 22), (3, 1, 64, 32)])
def test_rope(kernels: Kernels, dtype: str, heads: int, kv_heads: int, dim: int, rotary: int) -> None:
    qkv = normal(2, heads + 2 * kv_heads, dim, dtype=dtype)
    positions = np.array([3, 90000], np.int32)
    frequency = (1 / 10000.0 ** (np.arange(0, rotary, 2) / rotary)).astype(np.float32)
    q, k, v = (np.zeros((2, n, dim), dtype) for n in (heads, kv_heads, kv_heads))
    for row in range(2):
        kernels(f"mlcbuild_rope_{dtype}", qkv, positions, q, k, v, frequency, row, heads, kv_heads, dim, rotary)
    wide = qkv.astype(np.float64)
    # The angle is rounded to float32 there, as transformers does; sine and cosine of it are what is compared.
    angle = (positions[:, None].astype(np.float32) * frequency).astype(np.float64)[:, None, :]
    half = rotary // 2
    a, b = wide[..., :half], wide[..., half:rotary]
    turned = np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), wide[..., rotary:]], -1
    )
    close(q, turned[:, :heads], dtype)
    close(k, turned[:, heads : heads + kv_heads], dtype)
    assert (v == qkv[:, heads + kv_heads :]).all()


def attention(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, float]:
    """One query row over keys and values [n, dim], in float64; and log2 of the sum of 2^score."""
    scores = (k.astype(np.float64) @ q.astype(np.float64)) * scale * np.log2(np.e)
    weights = np.exp2(scores - scores.max())
    return weights @ v.astype(np.float64) / weights.sum(), float(scores.max() + np.log2(weights.sum()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [6, 64, 80])
def test_attention_among_new_tokens(kernels: Kernels, dtype: str, dim: int) -> None:
    heads, kv_heads, indptr = 4, 2, np.array([0, 5, 40], np.int32)
    q = normal(40, heads, dim, dtype=dtype)
    k, v = (normal(40, kv_heads, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    out, lse = np.zeros_like(q), np.zeros((40, heads), np.float32)
    scale = dim**-0.5
    for task in range(40 * heads):
        shape = (heads, kv_heads, dim, task, np.int32(1))
        kernels(f"mlcbuild_attention_ragged_{dtype}", q, indptr, k, v, indptr, out, lse, *shape, scale)
    for row in range(40):
        start = 0 if row < 5 else 5
        for head in range(heads):
            seen = slice(start, row + 1)
            expected, total = attention(q[row, head], k[seen, head // 2], v[seen, head // 2], scale)
            close(out[row, head], expected, dtype)
            assert abs(lse[row, head] - total) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sink", "window"), [(0, 0), (4, 21), (20, 37), (0, 16)])
def test_attention_over_pages_with_sinks_and_windows(kernels: Kernels, dtype: str, sink: int, window: int) -> None:
    """Positions below `sink` and from `window` on are seen; pages lie anywhere in the pool."""
    heads, kv_heads, dim, length, page = 2, 1, 24, 75, 16
    values = np.array([7, 2, 5, 0, 3], np.int32)
    pages = normal(8, 2, kv_heads, page, dim, dtype=dtype, seed=3)
    indptr, last = np.array([0, 5], np.int32), np.array([length - 64], np.int32)
    q = normal(1, heads, dim, dtype=dtype)
    out, lse = np.zeros_like(q), np.zeros((1, heads), np.float32)
    limits = [np.array([n], np.int32) for n in (window, sink)] if window else [None, None]
    for task in range(heads):
        kernels(
            f"mlcbuild_attention_paged_{dtype}", q, None, pages, indptr, values, last, *limits, out, lse,
            heads, kv_heads, dim, page, task, np.int32(0), 0, 0.3,
        )  # fmt: skip
    positions = [p for p in range(length) if p < sink or p >= window]
    k, v = (np.stack([pages[values[p // page], side, 0, p % page] for p in positions]) for side in (0, 1))
    for head in range(heads):
        expected, total = attention(q[0, head], k, v, 0.3)
        close(out[0, head], expected, dtype)
        assert abs(lse[0, head] - total) < 1e-4


def test_a_layer_with_a_sliding_window_sees_that_far_back(kernels: Kernels) -> None:
    """Row i of a chunk sees window - 1 - i cached positions: the others of its window are in the chunk."""
    dim, page, window = 8, 16, 12
    pages = normal(2, 2, 1, page, dim, seed=3)
    q = normal(14, 1, dim)
    out, lse = np.zeros_like(q), np.zeros((14, 1), np.float32)
    indptr, values, last = (np.array(n, np.int32) for n in ([0, 2], [1, 0], [4]))
    zero, rows = np.array([0], np.int32), np.array([0, 14], np.int32)
    for task in range(14):
        kernels(
            "mlcbuild_attention_paged_float32", q, rows, pages, indptr, values, last, zero, zero, out, lse,
            1, 1, dim, page, task, np.int32(1), window, 1.0,
        )  # fmt: skip
    k, v = (np.concatenate([pages[1, side, 0], pages[0, side, 0, :4]]) for side in (0, 1))
    for row in range(14):
        back = max(window - row - 1, 0)
        if back == 0:
            assert (out[row] == 0).all() and lse[row, 0] == -5e4
            continue
        close(out[row, 0], attention(q[row, 0], k[20 - back :], v[20 - back :], 1.0)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attentions_over_two_sets_of_keys_merge_into_one(kernels: Kernels, dtype: str) -> None:
    q, k, v = normal(16), normal(30, 16, seed=1), normal(30, 16, seed=2)
    parts = [attention(q, k[half], v[half], 0.25) for half in (slice(0, 11), slice(11, 30))]
    (out, other), (lse, other_lse) = zip(*parts, strict=True)
    a, b = out.astype(dtype), other.astype(dtype)
    s, t = np.array([lse], np.float32), np.array([other_lse], np.float32)
    kernels(f"mlcbuild_attention_merge_{dtype}", a, s, b, t, 16, 0)
    expected, total = attention(q, k, v, 0.25)
    close(a, expected, dtype)
    assert abs(s[0] - total) < 1e-5


def test_nan_is_never_lost_on_the_way(kernels: Kernels) -> None:
    """A check for NaN at the end of the model must see one that arose anywhere."""
    x = normal(1, 64)
    x[0, 3] = np.nan
    y = np.zeros((1, 32), np.float32)
    kernels("mlcbuild_gated_silu", x, y, 0, 32)
    assert np.isnan(y[0, 3])
    kernels("mlcbuild_softmax_float32", x, np.ones(1, np.float32), x, 0, 64)
    assert np.isnan(x).any()
    indptr = np.array([0, 1], np.int32)
    q, k, v = (normal(1, 1, 8, seed=seed) for seed in range(3))
    k[0, 0, 5] = np.nan
    out, lse = np.zeros_like(q), np.zeros((1, 1), np.float32)
    kernels("mlcbuild_attention_ragged_float32", q, indptr, k, v, indptr, out, lse, 1, 1, 8, 0, np.int32(1), 1.0)
    assert np.isnan(out).all()
