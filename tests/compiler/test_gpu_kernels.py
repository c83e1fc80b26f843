"""GPU kernels on every device that there is here (tests/support/gpus.py), against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import relax

from mlcbuild.compiler.abi import auxiliary, logits
from mlcbuild.compiler.gpu import choosing, products, rope, rows, sampling, softmax, sorting
from mlcbuild.models.rope import Rotary
from mlcbuild.quantization.schemes import parts
from tests.compiler.packing import pack, rounded
from tests.support.gpus import Gpu
from tests.support.llama import QUANTIZATIONS, Array

pytestmark = pytest.mark.slow

FORMATS = ["q0f32", "q0f16", "q4f16_1", "q4f16_0", "q3f16_1", "q8f16_1", "q4f32_1", "q4f32_0", "q4f16_autoawq"]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def floats(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def matrix(rng: np.random.Generator, name: str, n: int, k: int) -> tuple[tuple[Any, ...], dict[str, Array], Array]:
    """The parts of a random matrix as products.py takes them, their arrays by name, and the numbers they stand for."""
    quantization = QUANTIZATIONS[name]
    weights, dtype = quantization.weights, quantization.model_dtype
    packed = pack(floats(rng, n, k), weights, dtype)
    if weights is None:
        return (("weight", (n, k), dtype),), {"weight": packed.parts[0]}, packed.values
    described = parts(n, k, weights, dtype)
    arrays: dict[str, Array] = {part.form: array for part, array in zip(described, packed.parts, strict=True)}
    return tuple((p.form, p.shape, p.dtype) for p in described), arrays, packed.values


@pytest.mark.parametrize("name", FORMATS)
def test_products(gpu: Gpu, rng: np.random.Generator, name: str) -> None:
    """One row, a few, many: every kernel of a product, with rows and columns that are no multiple of tiles."""
    dtype = QUANTIZATIONS[name].model_dtype
    k = {"q3f16_1": 360, "q4f16_autoawq": 384}.get(name, 320)
    check_products(gpu, rng, name, 72, k, 72, (1, 5, 20, 40), "float32" if dtype == "float32" else "float16")


def test_a_product_with_open_rows(gpu: Gpu, rng: np.random.Generator) -> None:
    """The head: how many rows the matrix has is known at run time only."""
    check_products(gpu, rng, "q4f16_1", 77, 128, "rows", (1, 3, 32, 33), "float16")


def check_products(
    gpu: Gpu, rng: np.random.Generator, name: str, n: int, k: int, known: Any, lengths: tuple[int, ...], dtype: str
) -> None:
    """`known`: the matrix's rows, or the name that stands for them. `lengths`: of CUDA's functions; see `few`."""
    described, arrays, values = matrix(rng, name, n, k)
    opened = tuple((part, (known, *shape[1:]) if known != n else shape, of) for part, shape, of in described)
    wide = gpu.kind == "metal"
    function = gpu.scheduled(
        products.linear(opened, QUANTIZATIONS[name].weights, known, k, dtype, "float32", wide=wide)
    )
    few = lengths[:3] if gpu.kind == "cuda" else (1, 3, 7)
    count = len(gpu.kernels(function))
    for which, length in enumerate((*few, lengths[-1]) if count > 3 else (*lengths[:2], lengths[-1])):
        x = rounded(floats(rng, length, k), dtype)
        given = {"x": x.astype(dtype), **arrays, "product": np.zeros((length, n), np.float32)}
        got = gpu.launch(function, which, given, {"n": length, "rows": n})["product"]
        expected = x @ values.T
        assert np.abs(got - expected).max() < (2e-3 if dtype == "float16" else 1e-5) * np.abs(expected).max()


@pytest.mark.parametrize("name", ["q0f32", "q4f16_1", "q4f32_0"])
def test_embedding(gpu: Gpu, rng: np.random.Generator, name: str) -> None:
    dtype = QUANTIZATIONS[name].model_dtype
    described, arrays, values = matrix(rng, name, 50, 64)
    opened = tuple((part, ("rows", *shape[1:]), of) for part, shape, of in described)
    ids = np.array([3, 49, 0, 3], np.int32)
    function = gpu.scheduled(products.embedding(opened, QUANTIZATIONS[name].weights, 64, dtype))
    given = {"ids": ids, **arrays, "rows_of_embedding": np.zeros((4, 64), dtype)}
    got = gpu.launch(function, 0, given, {"n": 4, "rows": 50})["rows_of_embedding"]
    assert np.abs(got.astype(np.float32) - values[ids]).max() < (2e-3 if dtype == "float16" else 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_gathered_and_scattered(gpu: Gpu, rng: np.random.Generator, dtype: str) -> None:
    few, many = (floats(rng, count, 70).astype(dtype) for count in (2, 5))
    places, scattered = np.array([3, 1], np.int32), many.copy()
    scattered[places] = few
    for scatter, source, into, expected in ((False, many, few * 0, many[places]), (True, few, many, scattered)):
        function = gpu.scheduled(auxiliary._copy_rows(dtype, scatter, False))
        given = {"src": source, "indices": places, "dst": into}
        assert (gpu.launch(function, 0, given, {"count": 2, "m": 5, "n": 70})["dst"] == expected).all()


@pytest.mark.parametrize("vocabulary", [5, 1024, 5000, None])
def test_sorting(gpu: Gpu, rng: np.random.Generator, vocabulary: int | None) -> None:
    """The likeliest first; of equal ones the first token first, as a stable sort has it."""
    vocabulary = vocabulary or gpu.vocabulary
    values = rng.random((2, vocabulary)).astype(np.float32)
    values[1] = np.round(values[1], 2)  # many equal ones
    function = sorting.sort_rows(256)
    first, onward, back = gpu.kernels(function)
    zeros, whole = np.zeros_like(values), np.zeros(values.shape, np.int32)
    scalars = {"batch": 2, "width": vocabulary}
    given = {"values": values, "keys": zeros, "places": whole}
    got = first.run((-(-vocabulary // sorting.TILE), 2, 1), given, scalars)
    run, grid = sorting.TILE, (-(-vocabulary // (256 * 8)), 2, 1)
    double = 0
    while run < vocabulary:
        scalars |= {"double": double, "double_1": double}
        passed = onward.run(grid, {**got, "spare_keys": zeros, "spare_places": whole}, scalars)
        made = {**passed, "keys": zeros, "places": whole}
        got = back.run(grid, made, scalars)
        run, double = run * 4, double + 1
    order = np.argsort(-values, axis=1, kind="stable")
    assert (got["places"] == order).all()
    assert (got["keys"] == np.take_along_axis(values, order, 1)).all()


def probabilities(rng: np.random.Generator, batch: int, vocabulary: int) -> Array:
    p = np.exp(3 * rng.standard_normal((batch, vocabulary)))
    normed: Array = (p / p.sum(1, keepdims=True)).astype(np.float32)
    return normed


@pytest.mark.parametrize("vocabulary", [7, None])
def test_sampling_from_the_likeliest(gpu: Gpu, rng: np.random.Generator, vocabulary: int | None) -> None:
    """Of each row the fewest tokens that reach top_p are kept; the first whose running sum exceeds u * mass is it."""
    vocabulary = vocabulary or gpu.vocabulary
    probs = -np.sort(-probabilities(rng, 3, vocabulary), axis=1)
    top_p = np.array([0.3, 0.9, 1.5], np.float32)
    (kernel,) = gpu.kernels(choosing.kept_mass(256))
    scalars = {"batch": 3, "width": vocabulary}
    given = {"probs": probs, "top_p": top_p, "mass": np.zeros(3, np.float32)}
    mass = kernel.run((3, 1, 1), given, scalars)["mass"]
    sums = probs.astype(np.float64).cumsum(1)
    for row in range(3):
        kept = min(int((sums[row] < top_p[row]).sum()), vocabulary - 1)
        assert abs(mass[row] - sums[row, kept]) < 2e-5
    uniform, of = np.array([0.0, 0.5, 0.999, 0.1], np.float32), np.array([0, 1, 2, 1], np.int32)
    (kernel,) = gpu.kernels(choosing.choose(256, True))
    given = {"probs": probs, "mass": mass, "uniform": uniform, "rows": of, "chosen": np.zeros(4, np.int32)}
    chosen = kernel.run((4, 1, 1), given, {**scalars, "samples": 4})["chosen"]
    for u, row, place in zip(uniform, of, chosen, strict=True):
        wanted = float(u) * float(mass[row])
        assert (sums[row, place - 1] if place else 0) <= wanted + 2e-5 and wanted - 2e-5 <= sums[row, place]


def test_sampling_from_all(gpu: Gpu, rng: np.random.Generator) -> None:
    probs = probabilities(rng, 2, gpu.vocabulary)
    probs[:, :1000] = 0  # never sampled, not even by u = 0
    uniform, of = np.array([0.0, 0.25, 0.75], np.float32), np.array([0, 1, 1], np.int32)
    (kernel,) = gpu.kernels(choosing.choose(256, False))
    given = {"probs": probs, "uniform": uniform, "rows": of, "chosen": np.zeros(3, np.int32)}
    scalars = {"batch": 2, "width": gpu.vocabulary, "samples": 3}
    chosen = kernel.run((3, 1, 1), given, scalars)["chosen"]
    sums = probs.astype(np.float64).cumsum(1)
    for u, row, place in zip(uniform, of, chosen, strict=True):
        wanted = float(u) * sums[row, -1]
        assert place >= 1000 and sums[row, place - 1] <= wanted + 2e-5 and wanted - 2e-5 <= sums[row, place]


def test_what_is_looked_up_after_sampling(gpu: Gpu, rng: np.random.Generator) -> None:
    """The chosen tokens and their probabilities; tokens and probabilities at places in the sorted rows, end to end."""
    builder, width = relax.BlockBuilder(), gpu.vocabulary
    sampling.emit(builder, 256, drafts_too=False)
    functions = {variable.name_hint: function for variable, function in builder.get().functions_items()}
    probs = rng.random((3, width), np.float32)
    tokens = np.argsort(-probs, axis=1).astype(np.int32)
    of, chosen = np.array([2, 0, 0, 1], np.int32), np.array([0, width - 1, 7, 5], np.int32)
    places = np.array([0, width - 1, width, 2 * width + 3, 3 * width - 1], np.int32)
    top = tokens.ravel()[places]
    sizes = {"batch_size": 3, "vocab_size": width, "num_samples": 4, "num_positions": 5}
    for name, inputs, expected in (
        ("tokens_at", (tokens, of, chosen), tokens[of, chosen]),
        ("probs_of_chosen", (probs, of, chosen), probs[of, chosen]),
        ("top_tokens", (tokens, places), top),
        ("top_probs", (probs, top, places), probs[places // width, top]),
    ):
        names = [str(param.name) for param in functions[name].params]
        given = dict(zip(names, (*inputs, np.zeros_like(expected)), strict=True))
        assert (gpu.launch(gpu.scheduled(functions[name]), 0, given, sizes)[names[-1]] == expected).all(), name


def test_renormalizing(gpu: Gpu, rng: np.random.Generator) -> None:
    probs, top_p = probabilities(rng, 3, gpu.vocabulary), np.array([0.2, 0.8, 2.0], np.float32)
    (kernel,) = gpu.kernels(choosing.renormalize(256))
    hints = np.zeros((3, 3), np.float32)
    given = {"probs": probs, "top_p": top_p, "hints": hints, "out": np.zeros_like(probs)}
    got = kernel.run((3, 1, 1), given, {"batch": 3, "width": gpu.vocabulary, "hint_count": 3})["out"]
    for row in range(3):
        ordered = -np.sort(-probs[row])
        kept = min(int((ordered.astype(np.float64).cumsum() < top_p[row]).sum()), gpu.vocabulary - 1)
        expected = np.where(probs[row] >= ordered[kept], probs[row], 0)
        assert abs(int((got[row] > 0).sum()) - int((expected > 0).sum())) <= 2  # sums round at the border
        assert np.abs(got[row] - expected / expected.sum()).max() < 1e-4


@pytest.mark.parametrize("vocabulary", [300, None])
def test_softmax_with_temperature(gpu: Gpu, rng: np.random.Generator, vocabulary: int | None) -> None:
    vocabulary = vocabulary or gpu.vocabulary
    values, temperature = 5 * floats(rng, 3, vocabulary), np.array([1.0, 0.4, 0.0], np.float32)
    chunks = -(-vocabulary // softmax.CHUNK)
    scalars = {"batch": 3, "width": vocabulary, "chunks": chunks}
    (kernel,) = gpu.kernels(softmax.chunk_figures(256))
    zeros = np.zeros((3, chunks), np.float32)
    given: dict[str, Array] = {"logits": values, "temperature": temperature}
    figures = kernel.run((3 * chunks, 1, 1), {**given, "sums": zeros, "maxima": zeros}, scalars)
    (kernel,) = gpu.kernels(softmax.probabilities(256))
    got = kernel.run((3 * chunks, 1, 1), {**given, **figures, "out": np.zeros_like(values)}, scalars)["out"]
    for row in (0, 1):
        e = np.exp((values[row] - values[row].max()) / np.float64(temperature[row]))
        assert np.abs(got[row] - e / e.sum()).max() < 1e-6
    assert got[2].argmax() == values[2].argmax() and got[2].max() == 1 and got[2].sum() == 1


def test_logits_are_changed_in_place(gpu: Gpu, rng: np.random.Generator) -> None:
    bias, penalty, mask = (gpu.kernels(f)[0] for f in logits.functions(256).values())
    given: dict[str, Array] = {
        "logits": np.zeros((2, 5), np.float32),
        "pos2seq_id": np.array([0, 1, 1], np.int32),
        "token_ids": np.array([4, 0, 1], np.int32),
        "logit_bias": np.array([1.5, 2, 3], np.float32),
    }
    got = bias.run((1, 1, 1), given, {"batch": 2, "vocab": 5, "tokens": 3})["logits"]
    assert (got == [[0, 0, 0, 0, 1.5], [2, 3, 0, 0, 0]]).all()
    given = {
        "logits": np.array([[1, 1, 1], [4, -4, 1]], np.float32),
        "seq_ids": np.array([1], np.int32),
        "pos2seq_id": np.array([0, 0], np.int32),
        "token_ids": np.array([0, 1], np.int32),
        "token_cnt": np.array([2, 4], np.int32),
        "penalties": np.array([[0.5, 0.25, 2.0]], np.float32),
    }
    got = penalty.run((1, 1, 1), given, {"batch": 2, "vocab": 3, "tokens": 2, "sequences": 1})["logits"]
    expected = np.array([[1, 1, 1], [(4 - 0.5 - 0.5) / 2, (-4 - 0.5 - 1.0) * 2, 1]])
    assert np.abs(got - expected).max() < 1e-6
    allowed = rng.integers(0, 2, (3, 70)).astype(bool)
    words = np.zeros((3, 3), np.uint32)
    for token in range(70):
        words[:, token // 32] |= allowed[:, token].astype(np.uint32) << np.uint32(token % 32)
    given = {
        "logits": np.ones((3, 70), np.float32),
        "seq_ids": np.array([0, 2], np.int32),
        "bitmask": words.view(np.int32),
    }
    got = mask.run((1, 2, 1), given, {"batch": 3, "vocab": 70, "sequences": 2})["logits"]
    for row in (0, 2):
        assert (got[row][allowed[row]] == 1).all() and (got[row][~allowed[row]] < -3.4e38).all()
    assert (got[1] == 1).all()


@pytest.mark.parametrize(
    ("dim", "rotary"), [(512, Rotary(512)), (80, Rotary(16, neighbours=True, factor=1.2)), (32, Rotary(0))]
)
def test_rotary_embedding(gpu: Gpu, rng: np.random.Generator, dim: int, rotary: Rotary) -> None:
    """At positions up to 100,000, whose angles no GPU takes the cosine of as they are.

    Where a device does not round between multiplication and addition, an angle is off by half of its last place.
    """
    n, heads, kv_heads = 5, 4, 2
    qkv, positions = floats(rng, n, 8, dim), np.array([0, 1, 77, 4095, 100_000], np.int32)
    half = rotary.dim // 2
    frequency = (1 / 10_000 ** (np.arange(max(half, 1)) / max(half, 1))).astype(np.float32)
    angle = (positions[:, None].astype(np.float32) * frequency).astype(np.float64)
    expected = qkv.astype(np.float64)
    for d in range(half):
        a, b = (2 * d, 2 * d + 1) if rotary.neighbours else (d, d + half)
        cos, sin = (rotary.factor * f(angle[:, d])[:, None] for f in (np.cos, np.sin))
        x, y = qkv[:, :6, a].astype(np.float64), qkv[:, :6, b].astype(np.float64)
        expected[:, :6, a], expected[:, :6, b] = x * cos - y * sin, y * cos + x * sin
    function = gpu.scheduled(rope.split_rotary(heads, kv_heads, dim, rotary, "float32"))
    given = {"qkv": qkv, "positions": positions, "frequency": frequency}
    parts_of = {"q": (n, heads, dim), "k": (n, kv_heads, dim), "v": (n, kv_heads, dim)}
    empty = {name: np.zeros(shape, np.float32) for name, shape in parts_of.items()}
    got = gpu.launch(function, 0, {**given, **empty}, {"n": n, "offset": 0})
    together = np.concatenate([got["q"], got["k"], got["v"]], axis=1)
    bound = 1e-5 + 4 * np.spacing(positions.astype(np.float32))[:, None, None]
    assert (np.abs(together - expected) < bound).all()
    function = gpu.scheduled(rope.rope(heads, kv_heads, dim, rotary, "float32"))
    turned = gpu.launch(function, 0, {**given, "turned": np.zeros_like(qkv)}, {"n": n})["turned"]
    assert (np.abs(turned - expected) < bound).all()


def test_norms(gpu: Gpu, rng: np.random.Generator) -> None:
    x, w, b = floats(rng, 6, 96), floats(rng, 96), floats(rng, 96)
    given, wide = {"x": x, "w": w, "b": b, "normed": np.zeros_like(x)}, x.astype(np.float64)
    got = gpu.launch(gpu.scheduled(rows.rms_norm(96, 1e-5, "float32")), 0, given, {"n": 6})["normed"]
    assert np.abs(got - wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * w).max() < 1e-5
    function = gpu.scheduled(rows.layer_norm(96, 1e-5, "float32", True, True))
    got = gpu.launch(function, 0, given, {"n": 6})["normed"]
    centred = wide - wide.mean(1, keepdims=True)
    assert np.abs(got - (centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * w + b)).max() < 1e-5


@pytest.mark.parametrize(("spans", "biased"), [("head", True), ("per_head", False)])
def test_norms_of_queries_and_keys(gpu: Gpu, rng: np.random.Generator, spans: str, biased: bool) -> None:
    """Phi's, one for all heads, and StableLM's, one for each."""
    heads, kv_heads, dim = 4, 2, 32
    shapes = [(dim,) if spans == "head" else (n, dim) for n in (heads, kv_heads)]
    qkv, vectors = floats(rng, 5, heads + 2 * kv_heads, dim), [floats(rng, *shape) for shape in (*shapes, *shapes)]
    described = (*shapes, *(shapes if biased else (None, None)))
    function = gpu.scheduled(rows.norm_heads((heads, kv_heads), dim, described, spans, True, 1e-5, "float32"))
    names = ("q_norm", "k_norm", "q_norm_bias", "k_norm_bias")
    given = {"qkv": qkv, **dict(zip(names, vectors, strict=True)), "normed_heads": np.zeros_like(qkv)}
    got = gpu.launch(function, 0, given, {"n": 5})["normed_heads"]
    centred = qkv - qkv.astype(np.float64).mean(2, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(2, keepdims=True) + 1e-5)
    for part, side in ((slice(0, 4), 0), (slice(4, 6), 1)):
        wanted = expected[:, part] * vectors[side] + biased * vectors[side + 2]
        assert np.abs(got[:, part] - wanted).max() < 1e-5
    assert (got[:, heads + kv_heads :] == qkv[:, heads + kv_heads :]).all()
