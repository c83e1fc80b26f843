"""The CPU kernels one by one, against NumPy in float64: odd shapes, tails, every model dtype, and what NaN does."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable

import numpy as np
import pytest

from tests.compiler.kernels import LEVELS, LEVELS_HERE, Array, Kernels
from tests.compiler.packing import rounded, stored

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are built for x86-64 here")

_TOLERANCE = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}


class Model:
    """The kernels of one model dtype, and arrays of it."""

    def __init__(self, kernels: Kernels, dtype: str) -> None:
        self.call, self.dtype = kernels, dtype
        self.memory = np.dtype("uint16" if dtype == "bfloat16" else dtype)

    def normal(self, *shape: int, seed: int = 0) -> Array:
        """float32, of values that the dtype has."""
        return rounded(normal(*shape, seed=seed), self.dtype)

    def stored(self, values: Array) -> Array:
        return stored(values, self.dtype)

    def empty(self, *shape: int) -> Array:
        return np.zeros(shape, self.memory)

    def read(self, memory: Array) -> Array:
        if self.dtype == "bfloat16":
            return (memory.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return memory.astype(np.float32)

    def close(self, got: Array, expected: Array) -> None:
        close(self.read(got), expected, _TOLERANCE[self.dtype])


@pytest.fixture(scope="module", params=[(d, level) for level in LEVELS_HERE for d in _TOLERANCE], ids="-".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    dtype, level = request.param
    return Model(Kernels(LEVELS[level], tmp_path_factory.mktemp("kernels"), dtype), dtype)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(got: Array, expected: Array, tolerance: float = 3e-6) -> None:
    assert np.abs(got.astype(np.float64) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("width", [1, 7, 64, 193])
def test_rms_norm(model: Model, width: int) -> None:
    x, w = normal(3, width), model.normal(width, seed=1)
    y = np.zeros_like(x)
    for row in range(3):
        model.call("mlcbuild_rms_norm", x, model.stored(w), y, row, width, 1e-5)
    wide = x.astype(np.float64)
    close(y, wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * w)


@pytest.mark.parametrize("width", [2, 16, 37])
@pytest.mark.parametrize("given", ["weight and bias", "weight", "nothing"])
def test_layer_norm(model: Model, width: int, given: str) -> None:
    x, w, b = 50 + normal(3, width), model.normal(width, seed=1), model.normal(width, seed=2)
    weight, bias = (w if "weight" in given else None), (b if "bias" in given else None)
    y = np.zeros_like(x)
    vectors = [None if each is None else model.stored(each) for each in (weight, bias)]
    for row in range(3):
        model.call("mlcbuild_layer_norm", x, *vectors, y, row, width, 1e-5)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    # The differences from a mean of 50 have lost digits before any kernel saw them.
    close(y, expected * (1 if weight is None else w) + (0 if bias is None else b), 2e-5)


def _gelu_tanh(x: Array) -> Array:
    found: Array = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return found


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


@pytest.mark.parametrize("width", [1, 16, 37])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(model: Model, name: str, width: int) -> None:
    """Of one half times the other, and alone."""
    x = np.concatenate([20 * normal(1, 2 * width), normal(1, 2 * width, seed=1)])
    x[0, 0] = -200.0  # exp overflows float32
    y, alone = np.zeros((2, width), np.float32), np.zeros_like(x)
    for row in range(2):
        model.call(f"mlcbuild_gated_{name}", x, y, row, width)
        model.call(f"mlcbuild_activation_{name}", x, alone, row, 2 * width)
    wide = x.astype(np.float64)
    close(alone, ACTIVATIONS[name](wide))
    close(y, ACTIVATIONS[name](wide[:, :width]) * wide[:, width:])


@pytest.mark.parametrize("width", [1, 16, 1003])
def test_softmax_with_temperature(model: Model, width: int) -> None:
    x, temperature = 30 * normal(3, width), np.array([1.0, 0.3, 0.0], np.float32)
    x[2, : min(2, width)] = 1e3  # ties share at temperature 0
    y = np.zeros_like(x)
    for row in range(3):
        model.call("mlcbuild_softmax", x, temperature, y, row, width)
    for row in range(2):
        e = np.exp((x[row].astype(np.float64) - x[row].max()) / temperature[row])
        assert np.abs(y[row] - e / e.sum()).max() < 1e-6
    assert (y[2] == (x[2] == 1e3) / min(2, width)).all()


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary"), [(4, 2, 22, 22), (3, 1, 64, 32), (2, 2, 128, 128)])
def test_rope(model: Model, heads: int, kv_heads: int, dim: int, rotary: int, neighbours: bool) -> None:
    """Queries and keys are turned, whether they come apart or stay in one row."""
    qkv, factor = model.normal(2, heads + 2 * kv_heads, dim), 1.25
    positions = np.array([3, 90000], np.int32)
    frequency = (1 / 10000.0 ** (np.arange(0, rotary, 2) / rotary)).astype(np.float32)
    q, k, v = (model.empty(2, n, dim) for n in (heads, kv_heads, kv_heads))
    fused = model.empty(*qkv.shape)
    for row in range(2):
        sizes = (row, heads, kv_heads, dim, rotary, np.int32(neighbours), factor)
        model.call("mlcbuild_rope", model.stored(qkv), positions, q, k, v, frequency, *sizes)
        model.call("mlcbuild_rope_fused", model.stored(qkv), positions, frequency, fused, *sizes)
    wide = qkv.astype(np.float64)
    # The angle is rounded to float32 there, as transformers does; sine and cosine of it are what is compared.
    angle = (positions[:, None].astype(np.float32) * frequency).astype(np.float64)[:, None, :]
    pairs = wide[..., :rotary].reshape(*wide.shape[:-1], *((-1, 2) if neighbours else (2, -1)))
    axis = -1 if neighbours else -2
    a, b = np.moveaxis(pairs, axis, 0)
    both = np.stack([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis)
    turned = np.concatenate([factor * both.reshape(*wide.shape[:-1], rotary), wide[..., rotary:]], -1)
    model.close(q, turned[:, :heads])
    model.close(k, turned[:, heads : heads + kv_heads])
    assert (model.read(v) == qkv[:, heads + kv_heads :]).all()
    assert (np.concatenate([q, k, v], 1) == fused).all()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("spans", ["head", "per_head", "all"])
def test_norms_of_queries_and_keys(model: Model, spans: str, centred: bool, biased: bool) -> None:
    heads, kv_heads, dim = 4, 2, 22
    qkv = model.normal(2, heads + 2 * kv_heads, dim)
    q, k = np.split(qkv, [heads, heads + kv_heads], axis=1)[:2]
    weights, biases = (
        [model.normal(*((1,) if spans == "head" else (n,)), dim, seed=n + seed) for n in (heads, kv_heads)]
        for seed in (0, 10)
    )
    out = model.empty(*qkv.shape)
    for row in range(2):
        flags = (np.int32(spans == "all"), 0 if spans == "head" else dim, np.int32(centred), 1e-5)
        given = [*map(model.stored, (qkv, *weights)), *(model.stored(each) if biased else None for each in biases)]
        model.call("mlcbuild_norm_heads", *given, out, row, heads, kv_heads, dim, *flags)
    parts = np.split(out, [heads, heads + kv_heads], axis=1)
    for part, weight, bias, got in zip((q, k), weights, biases, parts, strict=False):
        axes = (1, 2) if spans == "all" else (2,)
        wide = part.astype(np.float64)
        wide = wide - wide.mean(axes, keepdims=True) if centred else wide
        model.close(got, wide / np.sqrt((wide**2).mean(axes, keepdims=True) + 1e-5) * weight + biased * bias)
    assert (model.read(out)[:, heads + kv_heads :] == qkv[:, heads + kv_heads :]).all()


def attention(q: Array, k: Array, v: Array, scale: float, cap: float = 0) -> tuple[Array, float]:
    """One query row over keys and values [n, dim], in float64; and log2 of the sum of 2^score."""
    scores = (k.astype(np.float64) @ q.astype(np.float64)) * scale
    scores = (cap * np.tanh(scores / cap) if cap else scores) * np.log2(np.e)
    weights = np.exp2(scores - scores.max())
    return weights @ v.astype(np.float64) / weights.sum(), float(scores.max() + np.log2(weights.sum()))


@pytest.mark.parametrize("dim", [6, 64, 80])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (56, 1)])
def test_attention_among_new_tokens(model: Model, dim: int, heads: int, kv_heads: int) -> None:
    indptr, block, shared = np.array([0, 5, 40], np.int32), 6, heads // kv_heads
    q = model.normal(40, heads, dim)
    k, v = (model.normal(40, kv_heads, dim, seed=seed) for seed in (1, 2))
    out, lse = model.empty(40, heads, dim), np.zeros((40, heads), np.float32)
    scale, (stored_q, stored_k, stored_v) = dim**-0.5, map(model.stored, (q, k, v))
    block = min(block, 48 // min(shared, 48))
    for task in range(-(-40 // block) * kv_heads):
        shape = (40, heads, kv_heads, dim, 0, block, task, 0, 0, 0.0, 0.0)
        at = np.array([*range(5), *range(35)], np.int32)
        given = (stored_q, indptr, stored_k, stored_v, indptr, at)
        model.call("mlcbuild_attention_ragged", *given, out, lse, *shape, scale)
    expected = np.zeros((40, heads, dim))
    for row in range(40):
        seen = slice(0 if row < 5 else 5, row + 1)
        for head in range(heads):
            group = head // shared
            expected[row, head], total = attention(q[row, head], k[seen, group], v[seen, group], scale)
            assert abs(lse[row, head] - total) < 1e-4
    model.close(out, expected)


@pytest.mark.parametrize(("half", "rank", "heads", "tasks"), [(288, 512, 6, 2), (32, 35, 3, 1), (144, 256, 50, 1)])
def test_new_tokens_over_rows_of_latents(model: Model, half: int, rank: int, heads: int, tasks: int) -> None:
    """A row's first half is the key, the other one the value; its first `rank` numbers are the value of all heads."""
    n, block, indptr = 20, max(1, 48 * tasks // heads), np.array([0, 3, 20], np.int32)
    q, k, v = model.normal(n, 2 * heads, half), model.normal(n, 1, half, seed=1), model.normal(n, 1, half, seed=2)
    out, lse, at = model.empty(n, 2 * heads, half), np.zeros((n, 2 * heads), np.float32), np.arange(n, dtype=np.int32)
    given = (model.stored(q), indptr, model.stored(k), model.stored(v), indptr, at)
    for task in range(-(-n // block) * tasks):
        shape = (n, heads, tasks, half, rank, block, task, 0, 0, 0.0, 0.0, half**-0.5)
        model.call("mlcbuild_attention_ragged", *given, out, lse, *shape)
    rows, got = np.concatenate([k, v], axis=2)[:, 0], model.read(out).reshape(n, heads, 2 * half)
    for row in range(n):
        seen = rows[0 if row < 3 else 3 : row + 1]
        for head in range(heads):
            query = q[row].reshape(heads, -1)[head]
            expected, total = attention(query, seen, seen[:, :rank], half**-0.5)
            close(got[row, head, :rank], expected, 3 * _TOLERANCE[model.dtype])
            assert np.abs(lse[row, 2 * head : 2 * head + 2] - total).max() < 1e-4
    assert (got[..., rank:] == 0).all()


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("window", [0, 7])
def test_new_tokens_with_a_window_and_a_soft_cap(model: Model, window: int, cap: float) -> None:
    """A negative scale says that the layer slides; a positive one that it does not, whatever the window."""
    dim, indptr = 16, np.array([0, 30], np.int32)
    q, k, v = (model.normal(30, 1, dim, seed=seed) for seed in range(3))
    given = [model.stored(q), indptr, model.stored(k), model.stored(v), indptr, np.arange(30, dtype=np.int32)]
    for scale in (0.9, -0.9):
        out, lse = model.empty(30, 1, dim), np.zeros((30, 1), np.float32)
        for task in range(3):
            model.call(
                "mlcbuild_attention_ragged", *given, out, lse, 30, 1, 1, dim, 0, 12, task, window, 0, cap, 0.0, scale
            )
        for row in range(30):
            seen = slice(max(0, row + 1 - window) if window and scale < 0 else 0, row + 1)
            expected, total = attention(q[row, 0], k[seen, 0], v[seen, 0], 0.9, cap)
            close(model.read(out)[row, 0], expected, 3 * _TOLERANCE[model.dtype])
            assert abs(lse[row, 0] - total) < 1e-4


@pytest.mark.parametrize("window", [0, 12, 40])
def test_attention_over_pages(model: Model, window: int) -> None:
    """Pages lie anywhere in the pool; a row of a chunk sees so much of the cache as its window has left for it."""
    heads, kv_heads, dim, page, block = 4, 2, 24, 16, 5
    starts, lengths, rows = np.array([10, 0], np.int32), [75, 3], np.array([0, 14, 20], np.int32)
    indptr, values = np.array([0, 5, 6], np.int32), np.array([7, 2, 5, 0, 3, 1], np.int32)
    pages = model.normal(8, 2, kv_heads, page, dim, seed=3)
    q = model.normal(20, heads, dim)
    positions = np.concatenate([85 + np.arange(14), 3 + np.arange(6)]).astype(np.int32)
    out, lse = model.empty(20, heads, dim), np.zeros((20, heads), np.float32)
    last = np.array([11, 3], np.int32)
    stored_q, stored_pages = map(model.stored, (q, pages))
    for task in range(4 * kv_heads):
        model.call(
            "mlcbuild_attention_paged", stored_q, rows, stored_pages, indptr, values, last, starts, positions, out, lse,
            20, heads, kv_heads, dim, 0, page, block, task, window, 0, 0.0, 0.0, -0.3,
        )  # fmt: skip
    for row in range(20):
        b = int(row >= 14)
        first = max(0, positions[row] - starts[b] - window + 1) if window else 0
        seen = range(min(first, lengths[b]), lengths[b])
        for head in range(heads):
            if not seen:
                assert (out[row, head] == 0).all() and lse[row, head] == -5e4
                continue
            slots = [(values[indptr[b] + p // page], head // 2, p % page) for p in seen]
            k, v = (np.stack([pages[at, side, kv, slot] for at, kv, slot in slots]) for side in (0, 1))
            expected, total = attention(q[row, head], k, v, 0.3)
            close(model.read(out)[row, head], expected, 3 * _TOLERANCE[model.dtype])
            assert abs(lse[row, head] - total) < 1e-4


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (12, 12), (56, 1)])
def test_linear_biases(model: Model, heads: int, kv_heads: int) -> None:
    """A score falls with the distance of its key, in each head by another slope: those of arXiv 2108.12409."""

    def slopes(count: int) -> list[float]:
        power = 2 ** int(np.log2(count))
        own = [2 ** (-8 * (h + 1) / power) for h in range(power)]
        return own if power == count else own + slopes(2 * power)[::2][: count - power]

    dim, indptr, shared = 16, np.array([0, 30], np.int32), heads // kv_heads
    q = model.normal(30, heads, dim)
    k, v = (model.normal(30, kv_heads, dim, seed=seed) for seed in (1, 2))
    out, lse = model.empty(30, heads, dim), np.zeros((30, heads), np.float32)
    given = [model.stored(q), indptr, model.stored(k), model.stored(v), indptr, np.arange(30, dtype=np.int32)]
    block = max(1, 48 // shared)
    for task in range(-(-30 // block) * kv_heads):
        shape = (30, heads, kv_heads, dim, 0, block, task, 0, 0, 0.0, 8.0)
        model.call("mlcbuild_attention_ragged", *given, out, lse, *shape, 0.25)
    expected = np.zeros((30, heads, dim))
    for row in range(30):
        for head, slope in enumerate(slopes(heads)):
            # A key that grows with its position and a query that is 1 there: the same by an addition to the product.
            distance = (np.arange(row + 1) - row)[:, None]
            biased = np.concatenate([k[: row + 1, head // shared], distance], 1)
            query = np.concatenate([q[row, head], [slope / 0.25]])
            expected[row, head], total = attention(query, biased, v[: row + 1, head // shared], 0.25)
            assert abs(lse[row, head] - total) < 1e-4
    model.close(out, expected)


def test_one_row_per_sequence_sees_itself(model: Model) -> None:
    """Decoding: the row's own key is in the cache, at its position."""
    dim, page = 8, 16
    pages, q = model.normal(3, 2, 1, page, dim, seed=3), model.normal(2, 1, dim)
    indptr, values, last = (np.array(n, np.int32) for n in ([0, 2, 3], [1, 0, 2], [4, 9]))
    starts, positions = np.array([0, 0], np.int32), np.array([19, 8], np.int32)
    out, lse = model.empty(2, 1, dim), np.zeros((2, 1), np.float32)
    given = [model.stored(q), None, model.stored(pages), indptr, values, last, starts, positions]
    for task in range(2):
        model.call("mlcbuild_attention_paged", *given, out, lse, 2, 1, 1, dim, 0, page, 1, task, 6, 0, 0.0, 0.0, -1.0)
    k, v = (np.concatenate([pages[1, side, 0], pages[0, side, 0]])[14:20] for side in (0, 1))
    model.close(out[0, 0], attention(q[0, 0], k, v, 1.0)[0])
    model.close(out[1, 0], attention(q[1, 0], pages[2, 0, 0, 3:9], pages[2, 1, 0, 3:9], 1.0)[0])


def test_attentions_over_two_sets_of_keys_merge_into_one(model: Model) -> None:
    q, k, v = normal(16), normal(30, 16, seed=1), normal(30, 16, seed=2)
    parts = [attention(q, k[half], v[half], 0.25) for half in (slice(0, 11), slice(11, 30))]
    (out, other), (lse, other_lse) = zip(*parts, strict=True)
    a, b = (model.stored(rounded(values, model.dtype)) for values in (out, other))
    s, t = np.array([lse], np.float32), np.array([other_lse], np.float32)
    model.call("mlcbuild_attention_merge", a, s, b, t, 16, 0)
    expected, total = attention(q, k, v, 0.25)
    model.close(a, expected)
    assert abs(s[0] - total) < 1e-5


def test_nan_is_never_lost_on_the_way(model: Model) -> None:
    """A check for NaN at the end of the model must see one that arose anywhere."""
    x = normal(1, 64)
    x[0, 3] = np.nan
    y = np.zeros((1, 32), np.float32)
    for name in ACTIVATIONS:
        model.call(f"mlcbuild_gated_{name}", x, y, 0, 32)
        assert np.isnan(y[0, 3])
    model.call("mlcbuild_layer_norm", x, None, None, y, 0, 32, 1e-5)
    assert np.isnan(y).any()
    model.call("mlcbuild_softmax", x, np.ones(1, np.float32), x, 0, 64)
    assert np.isnan(x).any()
    indptr = np.array([0, 1], np.int32)
    q, k, v = (model.normal(1, 1, 8, seed=seed) for seed in range(3))
    k[0, 0, 5] = np.nan
    out, lse, (q, k, v) = model.empty(1, 1, 8), np.zeros((1, 1), np.float32), map(model.stored, (q, k, v))
    shape = (1, 1, 1, 8, 0, 48, 0, 0, 0, 0.0, 0.0)
    model.call("mlcbuild_attention_ragged", q, indptr, k, v, indptr, indptr[:1], out, lse, *shape, 1.0)
    assert np.isnan(model.read(out)).all()
