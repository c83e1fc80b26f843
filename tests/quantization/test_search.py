"""`rounding: mse` and `calibrated`: the format of the reference rounding, with smaller errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.quantization import floats, group, search
from mlcbuild.quantization.floats import BadValue
from mlcbuild.quantization.packing import Packed, codes_of
from mlcbuild.recipes.types import Weights

Q4 = Weights(bits=4, group_size=32, storage_dtype="uint32", layout="NK", symmetric=True)
FORMATS = {
    "8 bits": Weights(8, 32, "uint32", "NK", True),
    "4 bits": Q4,
    "3 bits": Weights(3, 40, "uint32", "NK", True),
    "3 bits, uint16": Weights(3, 40, "uint16", "NK", True),
    "2 bits": Weights(2, 64, "uint32", "NK", True),
}


def weights_of(rows: int, k: int, tail: float = 5) -> npt.NDArray[np.float32]:
    """Trained weights have heavier tails than a normal distribution."""
    return (np.random.default_rng(0).standard_t(tail, (rows, k)) * 0.02).astype(np.float32)


def errors(
    packed: Packed, w: npt.NDArray[np.float32], weights: Weights, dtype: str, h: npt.NDArray[Any] | None = None
) -> npt.NDArray[np.float64]:
    """The weighted squared error of each group [rows, groups], but for a last rounding of each product."""
    scales = floats.widen(packed.scales, dtype).astype(np.float64).repeat(weights.group_size, axis=1)[:, : w.shape[1]]
    m = 2 ** (weights.bits - 1) - 1
    squares = ((codes_of(packed, w.shape[1], weights) - m) * scales - w) ** 2
    squares *= 1 if h is None else h
    padded = np.zeros((len(w), packed.scales.shape[1] * weights.group_size))
    padded[:, : w.shape[1]] = squares
    errors: npt.NDArray[np.float64] = padded.reshape(len(w), -1, weights.group_size).sum(axis=2)
    return errors


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize(("name", "ratio"), [("8 bits", 0.9), ("4 bits", 0.75), ("3 bits", 0.55), ("2 bits", 0.4)])
def test_smaller_errors_in_the_same_format(name: str, ratio: float, dtype: str) -> None:
    weights = FORMATS[name]
    w = weights_of(60, 500)
    reference = group.encode(w, "float32", weights, dtype)
    found = search.encode(w, "float32", weights, dtype)
    assert (found.words.shape, found.words.dtype) == (reference.words.shape, reference.words.dtype)
    assert (found.scales.shape, found.scales.dtype) == (reference.scales.shape, reference.scales.dtype)
    before, after = errors(reference, w, weights, dtype), errors(found, w, weights, dtype)
    assert after.sum() <= before.sum() * ratio
    assert (after <= before * (1 + 1e-5)).all()


def test_nearly_the_best_that_any_scale_can_do() -> None:
    """Against every float16 scale from half to twice the usual one, both signs, group by group."""
    w = weights_of(4, 96)
    found = errors(search.encode(w, "float32", Q4, "float32"), w, Q4, "float32")
    for row, of_row in zip(w, found, strict=True):
        for values, error in zip(row.reshape(-1, 32), of_row, strict=True):
            usual = np.abs(values).max() / 7
            scales = np.concatenate([np.linspace(0.5, 2, 3000), -np.linspace(0.5, 2, 3000)]) * usual
            codes = np.clip(np.rint(values / scales[:, None]), -7, 8)
            best = ((codes * scales[:, None] - values) ** 2).sum(axis=1).min()
            assert error <= 1.05 * best


def test_the_spare_code_and_negative_scales_are_used() -> None:
    packed = search.encode(weights_of(100, 320), "float32", Q4, "float16")
    codes = codes_of(packed, 320, Q4)
    assert codes.max() == 15 and codes.min() == 0
    assert (packed.scales < 0).any() and (packed.scales > 0).any()
    assert group.encode(weights_of(100, 320), "float32", Q4, "float16").words.max() < 0xF0000000


@pytest.mark.parametrize("name", FORMATS)
def test_weighted_errors_count_by_column(name: str) -> None:
    weights = FORMATS[name]
    w = weights_of(60, 500)
    h = np.exp(np.random.default_rng(1).standard_normal(500) * 1.5).astype(np.float32)
    plain, weighted = (search.encode(w, "float32", weights, "float16", each) for each in (None, h))
    one, other = (errors(packed, w, weights, "float16", h).sum() for packed in (plain, weighted))
    assert other < 0.97 * one
    one, other = (errors(packed, w, weights, "float16").sum() for packed in (plain, weighted))
    assert one < other


def test_equal_weights_are_no_weights() -> None:
    w = weights_of(20, 200)
    h = np.full(200, 3.5, np.float32)
    zero = search.encode(w, "float32", Q4, "float16", np.zeros(200, np.float32))
    same = search.encode(w, "float32", Q4, "float16", h)
    assert np.array_equal(zero.words, same.words)  # all columns matter alike when none does
    assert errors(same, w, Q4, "float16").sum() <= errors(search.encode(w, "float32", Q4, "float16"), w, Q4,
                                                          "float16").sum()  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_a_zero_group_has_scale_zero(dtype: str) -> None:
    packed = search.encode(np.zeros((2, 64), np.float32), "float32", Q4, dtype)
    assert not packed.scales.view(np.uint8).any()
    assert not group.decode(packed, 64, Q4, dtype).any()


@pytest.mark.parametrize("size", [2.0**-24, 2.0**-22, 2.0**-20, 2.0**-30])
def test_denormal_groups_are_no_worse_and_finite(size: float) -> None:
    w = (np.random.default_rng(0).uniform(-1, 1, (50, 32)) * size).astype(np.float32)
    found, reference = search.encode(w, "float32", Q4, "float16"), group.encode(w, "float32", Q4, "float16")
    assert np.isfinite(found.scales).all()
    assert errors(found, w, Q4, "float16").sum() <= errors(reference, w, Q4, "float16").sum()


def test_the_largest_float16_does_not_overflow() -> None:
    w = np.full((1, 64), 65504, np.float32)
    w[0, ::2] = -65504
    packed = search.encode(w, "float32", FORMATS["2 bits"], "float16")
    assert np.isfinite(packed.scales).all()
    assert np.isfinite(group.decode(packed, 64, FORMATS["2 bits"], "float16")).all()


def test_the_tail_of_a_partial_group_is_zero_bits_and_counts_for_nothing() -> None:
    w = weights_of(5, 37)
    packed = search.encode(w, "float32", Q4, "float16", np.ones(37, np.float32))
    assert packed.words.shape == (5, 8) and not packed.words[:, 6:].any()
    assert not (packed.words[:, 5] >> 20).any()
    alone = search.encode(np.ascontiguousarray(w[:, 32:]), "float32", Q4, "float16", np.ones(5, np.float32))
    assert np.array_equal(packed.scales[:, 1:], alone.scales)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -70000.0])
def test_bad_values_are_found(bad: float) -> None:
    values = np.ones((300, 70), np.float32)
    values[250, 69] = bad
    with pytest.raises(BadValue) as error:
        search.encode(floats.cast(values, "float32", "bfloat16"), "bfloat16", Q4, "float16")
    assert (error.value.index, error.value.dtype) == (250 * 70 + 69, "float16")


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights_of(50, 100)
    h = np.linspace(0, 1, 100, dtype=np.float32)
    whole = search.encode(w, "float32", Q4, "float16", h)
    monkeypatch.setattr(search, "_BLOCK", 1000)
    pieces = search.encode(w, "float32", Q4, "float16", h)
    assert np.array_equal(whole.words, pieces.words) and np.array_equal(whole.scales, pieces.scales)
