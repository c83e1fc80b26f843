"""`rounding: gptq`: the kernels against NumPy, and against GPTQ as its authors wrote it down."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.quantization import asymmetric, feedback, floats, group, search
from mlcbuild.quantization.feedback import Gram, Kernels, Metric
from mlcbuild.quantization.packing import Packed, codes_of
from mlcbuild.recipes.types import Weights

FORMATS = {
    "8 bits": (Weights(8, 32, "uint32", "NK", True), "float16"),
    "4 bits": (Weights(4, 32, "uint32", "NK", True), "float16"),
    "4 bits, bfloat16": (Weights(4, 32, "uint32", "NK", True), "bfloat16"),
    "3 bits": (Weights(3, 40, "uint32", "NK", True), "float32"),
    "3 bits, uint16": (Weights(3, 40, "uint16", "NK", True), "float16"),
    "4 bits, asymmetric": (Weights(4, 32, "uint32", "KN", False, packed_scale_min="bf16x2"), "float32"),
}
K = 320  # whole groups of 32 and of 40
Matrix = npt.NDArray[Any]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(tmp_path_factory.mktemp("kernels"), threads=2)


def inputs(k: int = K, tokens: int = 700) -> Matrix:
    """Columns of different sizes that depend on each other, as those of a model do."""
    random = np.random.default_rng(1)
    mixed = np.eye(k) + 0.1 * random.standard_normal((k, k))
    x: Matrix = (random.standard_normal((tokens, k)) * np.exp(random.standard_normal(k) * 0.5)) @ mixed
    return x.astype(np.float32)


def matrix(rows: int = 40, k: int = K) -> Matrix:
    return (np.random.default_rng(0).standard_t(5, (rows, k)) * 0.02).astype(np.float32)


def measured(kernels: Kernels, weights: Weights, k: int = K, damping: float = 0.05) -> tuple[Metric, Matrix]:
    """The metric, and the same matrix [k, k] by NumPy."""
    x = inputs(k)
    gram = Gram(kernels, k, weights)
    for part in (x[:300], x[300:]):
        gram.add(part)
    h = x.T.astype(np.float64) @ x
    return feedback.metric(kernels, gram.sums, weights, damping), h + damping * np.diag(h).mean() * np.eye(k)


def decoded(packed: Packed, k: int, weights: Weights, dtype: str) -> Matrix:
    return group.decode(packed, k, weights, dtype) if weights.symmetric else asymmetric.decode(packed, k, weights)


def nearest(w: Matrix, weights: Weights, dtype: str) -> Packed:
    if not weights.symmetric:
        return asymmetric.encode(w, "float32", weights)
    return group.encode(w, "float32", weights, dtype)


def errors(w: Matrix, q: Matrix, h: Matrix) -> Matrix:
    """What the outputs are wrong by, squared, for each row."""
    e = w.astype(np.float64) - q
    found: Matrix = np.einsum("ij,jk,ik->i", e, h, e)
    return found


def gptq(w: Matrix, h: Matrix, scales: Matrix, size: int, bits: int) -> Matrix:
    """The numbers [rows, k] of algorithm 1 of arXiv 2210.17323, in float64, the scale of each group given.

    The columns are taken from the last to the first.
    """
    m = 2 ** (bits - 1) - 1
    w, h = w[:, ::-1].astype(np.float64), h[::-1, ::-1]
    step = scales.astype(np.float64).repeat(size, axis=1)[:, ::-1]
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    q = np.zeros_like(w)
    for i in range(w.shape[1]):
        with np.errstate(all="ignore"):
            q[:, i] = np.where(step[:, i] == 0, 0, np.clip(np.rint(w[:, i] / step[:, i]), -m, m + 1) * step[:, i])
        error = (w[:, i] - q[:, i]) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
    return q[:, ::-1]


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_err_least_in_the_same_format(kernels: Kernels, name: str) -> None:
    weights, dtype = FORMATS[name]
    w = matrix()
    by, h = measured(kernels, weights)
    before = nearest(w, weights, dtype)
    found, values = feedback.rounded(kernels, w, by, weights, dtype)
    assert (found.words.shape, found.words.dtype) == (before.words.shape, before.words.dtype)
    assert (found.scales.shape, found.scales.dtype) == (before.scales.shape, before.scales.dtype)
    q = decoded(found, K, weights, dtype)  # what a library computes with
    np.testing.assert_allclose(q, values, rtol=2**-8 if dtype == "bfloat16" else 2**-11, atol=1e-9)
    ours, theirs = errors(w, q, h), errors(w, decoded(before, K, weights, dtype), h)
    assert (ours < theirs).all() and ours.sum() < 0.35 * theirs.sum()
    if weights.symmetric:
        searched = search.encode(w, "float32", weights, dtype, np.diag(h).astype(np.float32))
        assert ours.sum() < 0.55 * errors(w, decoded(searched, K, weights, dtype), h).sum()


@pytest.mark.parametrize("name", ["4 bits", "3 bits"])
def test_the_first_pass_is_gptq(kernels: Kernels, name: str) -> None:
    """With the scales that were chosen; float32 sums may turn a code over where float64 ones do not."""
    weights, dtype = FORMATS[name]
    w = matrix()
    by, h = measured(kernels, weights)
    found, values = feedback.rounded(kernels, w, by, weights, dtype, passes=0)
    expected = gptq(w, h, floats.widen(found.scales, dtype), weights.group_size, weights.bits)
    same = np.isclose(values, expected, atol=1e-6)
    assert same[:, -weights.group_size :].mean() > 0.99
    assert same.all(axis=1).mean() > 0.8
    assert errors(w, expected, h).sum() == pytest.approx(errors(w, values, h).sum(), rel=0.02)


@pytest.mark.parametrize("name", ["4 bits", "3 bits, uint16", "4 bits, asymmetric"])
def test_no_pass_makes_a_row_worse(kernels: Kernels, name: str) -> None:
    weights, dtype = FORMATS[name]
    w = matrix()
    by, h = measured(kernels, weights)
    found = [errors(w, feedback.rounded(kernels, w, by, weights, dtype, passes)[1], h) for passes in range(4)]
    for before, after in pairwise(found):
        assert (after <= before * (1 + 1e-4)).all()
    assert found[-1].sum() < 0.9 * found[0].sum()


def test_independent_columns_are_rounded_on_their_own(kernels: Kernels) -> None:
    """Without anything to make good, it is the search of `calibrated`, with nearly the same errors."""
    weights, dtype = FORMATS["4 bits"]
    w, h = matrix(), np.exp(np.random.default_rng(2).standard_normal(K)).astype(np.float32)
    by = feedback.metric(kernels, np.diag(h), weights, 1e-6)
    ours = errors(w, feedback.rounded(kernels, w, by, weights, dtype)[1], np.diag(h)).sum()
    theirs = errors(w, decoded(search.encode(w, "float32", weights, dtype, h), K, weights, dtype), np.diag(h)).sum()
    assert 0.9 * theirs < ours < 1.02 * theirs


def test_threads_and_neighbours_change_no_byte(kernels: Kernels, tmp_path: Path) -> None:
    weights, dtype = FORMATS["4 bits"]
    w, one = matrix(), Kernels(tmp_path, threads=1)
    results = [feedback.rounded(each, w, measured(each, weights)[0], weights, dtype)[0] for each in (kernels, one)]
    few, _ = feedback.rounded(one, w[17:20], measured(one, weights)[0], weights, dtype)
    for part in ("words", "scales"):
        assert np.array_equal(getattr(results[0], part), getattr(results[1], part))
        assert np.array_equal(getattr(results[0], part)[17:20], getattr(few, part))


def test_a_partial_last_group(kernels: Kernels) -> None:
    weights, dtype = FORMATS["4 bits"]
    w = matrix(5, 77)
    by, h = measured(kernels, weights, 77)
    found, values = feedback.rounded(kernels, w, by, weights, dtype)
    assert found.words.shape == (5, 12) and found.scales.shape == (5, 3)
    assert not found.words[:, 10:].any() and not (found.words[:, 9] >> 20).any()
    assert codes_of(found, 77, weights).max() <= 15
    np.testing.assert_allclose(group.decode(found, 77, weights, dtype), values, rtol=2**-11, atol=1e-9)
    assert (errors(w, values, h) < errors(w, decoded(nearest(w, weights, dtype), 77, weights, dtype), h)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_what_nothing_runs_through(kernels: Kernels, name: str) -> None:
    weights, dtype = FORMATS[name]
    nothing = feedback.metric(kernels, np.zeros((K, K), np.float32), weights, 0.1)
    found, values = feedback.rounded(kernels, np.zeros((3, K), np.float32), nothing, weights, dtype)
    assert not values.any() and not decoded(found, K, weights, dtype).any()
    w = matrix(3)
    _, values = feedback.rounded(kernels, w, nothing, weights, dtype)
    assert errors(w, values, np.eye(K)).sum() <= errors(
        w, decoded(nearest(w, weights, dtype), K, weights, dtype), np.eye(K)
    ).sum()  # fmt: skip


def test_products_and_triangles(kernels: Kernels) -> None:
    """Sizes that are no multiples of what the kernels do at once."""
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((300, n)).astype(np.float32) for n in (70, 96))
    out = np.ones((70, 96), np.float32)
    kernels.add_products(out, a, b, -1.0)
    np.testing.assert_allclose(out, 1 - a.T @ b, rtol=1e-4, atol=1e-4)
    for k in (32, 160, 208):
        x = inputs(k)
        h = x.T @ x + np.eye(k, dtype=np.float32)
        r = kernels.triangle(np.triu(h), 1.0)
        np.testing.assert_allclose(r, np.linalg.cholesky(h.astype(np.float64)).T, rtol=1e-3, atol=1e-2)
