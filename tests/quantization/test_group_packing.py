"""Group quantization, bit for bit, against the formulas of docs/quantization.md worked out here in float16 arithmetic.

`reference` and `pack` are written from the formulas: NumPy's float16 rounds after every operation, one at a time.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.quantization import floats, group
from mlcbuild.quantization.floats import BadValue
from mlcbuild.quantization.packing import Packed
from mlcbuild.recipes.types import Weights

Q4 = Weights(bits=4, group_size=32, storage_dtype="uint32", layout="NK", symmetric=True)
FORMATS = {
    "4 bits": Q4,
    "3 bits": Weights(3, 40, "uint32", "NK", True),
    "3 bits, uint16": Weights(3, 40, "uint16", "NK", True),
    "8 bits": Weights(8, 32, "uint32", "NK", True),
    "2 bits": Weights(2, 64, "uint32", "NK", True),
    "4 bits, group 128": Weights(4, 128, "uint32", "NK", True),
    "4 bits, bytes": Weights(4, 8, "uint8", "NK", True),
}
NUMPY: dict[str, type[np.floating[Any]]] = {"float16": np.float16, "float32": np.float32}


def reference(
    w: npt.NDArray[Any], weights: Weights, dtype: type[np.floating[Any]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Codes `[N, K]` and scales `[N, groups]` of w `[N, K]`, every step rounded to `dtype`."""
    m = dtype(2 ** (weights.bits - 1) - 1)
    w = w.astype(dtype)
    codes = np.zeros(w.shape, np.int64)
    scales = []
    with np.errstate(all="ignore"):
        for start in range(0, w.shape[1], weights.group_size):
            columns = w[:, start : start + weights.group_size]
            scale = np.abs(columns).max(axis=1) / m
            code = np.rint(columns / scale[:, None] + m)
            code = np.where(np.isnan(code), 0, np.clip(code, 0, 2 * m))  # 0 / 0: MLC's kernels give 0
            codes[:, start : start + weights.group_size] = code
            scales.append(scale)
    return codes, np.stack(scales, axis=1)


def pack(codes: npt.NDArray[np.int64], weights: Weights) -> npt.NDArray[Any]:
    """Words `[N, words]`: value i of a word at bit i * bits; the tail of a partial last group is 0."""
    bits = int(weights.storage_dtype.removeprefix("uint"))
    per_word = bits // weights.bits
    groups = -(-codes.shape[1] // weights.group_size)
    words = np.zeros((len(codes), groups * weights.group_size // per_word), np.uint64)
    for k in range(codes.shape[1]):
        words[:, k // per_word] |= codes[:, k].astype(np.uint64) << np.uint64(k % per_word * weights.bits)
    return words.astype(weights.storage_dtype)


def check(values: npt.NDArray[Any], source: str, weights: Weights, model_dtype: str) -> Packed:
    raw = floats.cast(values, "float32", source)
    packed = group.encode(raw, source, weights, model_dtype)
    codes, scales = reference(floats.widen(raw, source), weights, NUMPY[model_dtype])
    assert np.array_equal(packed.scales.view(np.uint8), scales.view(np.uint8))
    assert np.array_equal(packed.words, pack(codes, weights))
    return packed


@pytest.mark.parametrize("model_dtype", ["float16", "float32"])
@pytest.mark.parametrize("source", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_bytes(name: str, source: str, model_dtype: str) -> None:
    rng = np.random.default_rng(7)
    for size in (1.0, 0.02, 1e-4, 1e-6, 1e-7):  # the last ones reach float16's denormals
        for k in (256, 100, 37):
            values = (rng.standard_normal((40, k)) * size).astype(np.float32)
            values[3] = 0
            values[4] = -0.0
            values[5, : k // 2] = 0
            values[6] = np.round(values[6] / size) * size  # many equal values and exact halves
            check(values, source, FORMATS[name], model_dtype)


@pytest.mark.parametrize("name", ["4 bits", "3 bits", "8 bits"])
def test_every_half_as_a_weight(name: str) -> None:
    """All float16 values up to a group's largest one, for scales of every kind."""
    weights = FORMATS[name]
    positive = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    for largest in (65504.0, 7.0, 6.996, 1.0, 0.3333, 0.02, 5e-4, 1e-4, 6.1e-5, 3e-6, 4.2e-7, 1.2e-7, 6e-8):
        top = np.float16(largest)
        values = positive[positive <= top]
        values = np.concatenate([values, -values])
        rest = weights.group_size - 1
        values = np.resize(values, (-(-len(values) // rest), rest))
        rows = np.concatenate([np.full((len(values), 1), top), values], axis=1)
        check(rows.astype(np.float32), "float16", weights, "float16")


def test_every_half_as_the_largest_weight() -> None:
    """Every positive float16 as a group's largest value, with the weights where codes change and their neighbours."""
    largest = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16)
    scale = (largest / np.float16(7)).astype(np.float32)
    rows = [largest]
    for boundary in np.arange(-6.5, 7, 1, dtype=np.float32):
        weight = (scale * boundary).astype(np.float16).view(np.int16)
        rows += [(weight + step).astype(np.int16).view(np.float16) for step in (-2, -1, 0, 1, 2)]
    rows += [largest * np.float16(0)] * (-len(rows) % 32)
    matrix = np.stack(rows, axis=1)
    matrix = np.where(np.abs(matrix) <= largest[:, None], matrix, np.float16(0)).astype(np.float32)
    check(matrix, "float16", Q4, "float16")


def test_against_exact_arithmetic() -> None:
    """The same steps on rational numbers, rounded by hand: NumPy's float16 is not taken on trust."""

    def half(value: Fraction) -> Fraction:
        exponent = -14
        while abs(value) >= Fraction(2) ** (exponent + 1):
            exponent += 1
        step = Fraction(2) ** (exponent - 10)
        return round(value / step) * step

    rng = np.random.default_rng(3)
    w = (rng.standard_normal((24, 32)) * 2.0 ** rng.integers(-18, 3, (24, 1))).astype(np.float16)
    packed = group.encode(w, "float16", Q4, "float16")
    for row, words, scale in zip(w, packed.words, packed.scales[:, 0], strict=True):
        exact = [Fraction(float(value)) for value in row]
        step = half(max(abs(value) for value in exact) / 7)
        assert Fraction(float(scale)) == step
        for position, value in enumerate(exact):
            code = min(max(round(half(half(value / step) + 7)), 0), 14)
            assert int(words[position // 8]) >> (position % 8 * 4) & 15 == code


def test_float32_codes_near_the_boundaries() -> None:
    rng = np.random.default_rng(5)
    largest = rng.uniform(0.001, 10, 4000).astype(np.float32)
    scale = largest / np.float32(7)
    near = scale[:, None] * (np.arange(31, dtype=np.float32) % 14 - np.float32(6.5))
    near = (near.view(np.int32) + rng.integers(-2, 3, near.shape, dtype=np.int32)).view(np.float32)
    check(np.concatenate([largest[:, None], near], axis=1), "float32", Q4, "float32")


@pytest.mark.parametrize("model_dtype", ["float16", "float32"])
def test_a_zero_group_is_all_zero_bytes_and_decodes_to_zero(model_dtype: str) -> None:
    packed = group.encode(np.zeros((2, 64), np.float32), "float32", Q4, model_dtype)
    assert not packed.words.any() and not packed.scales.view(np.uint8).any()
    assert not group.decode(packed, 64, Q4, model_dtype).any()


def test_a_group_of_denormals_has_scale_zero_and_decodes_to_zero() -> None:
    tiny = np.full((1, 32), 2.0**-24, np.float32)  # float16's smallest: a seventh of it is 0
    tiny[0, 1] = -tiny[0, 1]
    tiny[0, 2] = 0
    packed = check(tiny, "float32", Q4, "float16")
    assert packed.scales[0, 0] == 0
    assert packed.words[0, 0] == 0xEEEEE00E  # 1 / 0 is Inf: code 14; -1 / 0: 0; 0 / 0: 0
    assert not group.decode(packed, 32, Q4, "float16").any()


def test_the_tail_of_a_partial_group_is_zero_bits() -> None:
    packed = check(np.ones((3, 37), np.float32), "float32", Q4, "float16")
    assert packed.words.shape == (3, 8) and packed.scales.shape == (3, 2)
    assert packed.words[0].tolist() == [0xEEEEEEEE] * 4 + [0x000EEEEE, 0, 0, 0]


def test_a_row_longer_than_a_block() -> None:
    values = np.random.default_rng(0).standard_normal((2, 600_000)).astype(np.float16)
    whole = group.encode(values, "float16", Q4, "float16")
    part = group.encode(np.ascontiguousarray(values[:, -64:]), "float16", Q4, "float16")
    assert np.array_equal(whole.words[:, -8:], part.words) and np.array_equal(whole.scales[:, -2:], part.scales)


def test_rows_at_odd_addresses_and_in_many_blocks() -> None:
    rng = np.random.default_rng(11)
    values = rng.standard_normal((3000, 96)).astype(np.float32)  # more than one block
    whole = check(values, "bfloat16", Q4, "float16")
    raw = floats.cast(values, "float32", "bfloat16")
    shifted = np.empty(raw.nbytes + 1, np.uint8)[1:].view(np.uint16).reshape(raw.shape)
    shifted[:] = raw
    assert np.array_equal(group.encode(shifted, "bfloat16", Q4, "float16").words, whole.words)


@pytest.mark.parametrize("source", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("model_dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_found(source: str, model_dtype: str, bad: float) -> None:
    values = np.ones((5000, 70), np.float32)
    values[4321, 69] = bad
    with pytest.raises(BadValue) as error:
        group.encode(floats.cast(values, "float32", source), source, Q4, model_dtype)
    assert error.value.index == 4321 * 70 + 69


@pytest.mark.parametrize("source", ["bfloat16", "float32"])
def test_a_value_too_large_for_float16_is_found(source: str) -> None:
    values = np.full((4, 32), 65280, np.float32)
    raw = floats.cast(values, "float32", source)
    assert group.encode(raw, source, Q4, "float16").scales[0, 0] == np.float16(65280) / np.float16(7)
    values[2, 3] = -65536
    with pytest.raises(BadValue) as error:
        group.encode(floats.cast(values, "float32", source), source, Q4, "float16")
    assert error.value.index == 2 * 32 + 3


@pytest.mark.parametrize("model_dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_decode(name: str, model_dtype: str) -> None:
    """(code - m) * scale in the model dtype, and at most half a step from the weight."""
    weights = FORMATS[name]
    values = np.random.default_rng(2).standard_normal((20, 100)).astype(np.float32)
    packed = group.encode(values, "float32", weights, model_dtype)
    codes, scales = reference(values, weights, NUMPY[model_dtype])
    steps = np.repeat(scales, weights.group_size, axis=1)[:, :100]
    m = 2 ** (weights.bits - 1) - 1
    expected = ((codes - m).astype(NUMPY[model_dtype]) * steps).astype(np.float32)
    decoded = group.decode(packed, 100, weights, model_dtype)
    assert np.array_equal(decoded, expected)
    assert (np.abs(decoded - values) <= steps * (0.51 + (m == 127) * 0.1)).all()


def test_bfloat16_model_dtype_rounds_every_step() -> None:
    def rounded(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return floats.widen(floats.cast(values, "float32", "bfloat16"), "bfloat16")

    values = rounded(np.random.default_rng(9).standard_normal((500, 64)).astype(np.float32))
    packed = group.encode(floats.cast(values, "float32", "bfloat16"), "bfloat16", Q4, "bfloat16")
    groups = values.reshape(-1, 32)
    scale = rounded(np.abs(groups).max(axis=1) / np.float32(7))
    codes = np.clip(np.rint(rounded(rounded(groups / scale[:, None]) + np.float32(7))), 0, 14).astype(np.int64)
    assert np.array_equal(floats.widen(packed.scales, "bfloat16").reshape(-1), scale)
    assert np.array_equal(packed.words, pack(codes.reshape(values.shape), Q4))
