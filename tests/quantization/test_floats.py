"""Casts between float16, bfloat16 and float32, against exact rational arithmetic and NumPy's own float16."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.quantization import floats

EVERY_HALF: npt.NDArray[np.uint16] = np.arange(1 << 16, dtype=np.uint16)


def bfloat16_value(bits: int) -> Fraction:
    """A finite bfloat16 by its definition: sign, 8 exponent bits, 7 mantissa bits."""
    sign = -1 if bits >> 15 else 1
    exponent, mantissa = bits >> 7 & 0xFF, bits & 0x7F
    if exponent == 0:
        return sign * Fraction(mantissa, 1 << 7) / (1 << 126)
    return sign * (1 + Fraction(mantissa, 1 << 7)) * Fraction(2) ** (exponent - 127)


def round_to(value: Fraction, mantissa_bits: int, smallest_exponent: int) -> Fraction:
    """`value` rounded half to even to a binary float without an upper limit."""
    if value == 0:
        return value
    exponent = smallest_exponent
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - mantissa_bits)
    return round(value / step) * step  # Python rounds half to even


def test_bfloat16_widens_exactly() -> None:
    finite = [bits for bits in range(0, 1 << 16, 7) if bits & 0x7FFF < 0x7F80]
    wide = floats.widen(np.array(finite, np.uint16), "bfloat16")
    assert [Fraction(float(value)) for value in wide] == [bfloat16_value(bits) for bits in finite]


def test_float16_widens_exactly() -> None:
    halves = EVERY_HALF.view(np.float16)
    assert np.array_equal(floats.widen(halves, "float16"), halves.astype(np.float32), equal_nan=True)


def test_bfloat16_to_float16_rounds_half_to_even() -> None:
    finite = [bits for bits in range(1 << 16) if bits & 0x7FFF < 0x4780 and bits % 3 == 0]
    made = floats.cast(np.array(finite, np.uint16), "bfloat16", "float16")
    for bits, value in zip(finite, made, strict=True):
        assert Fraction(float(value)) == round_to(bfloat16_value(bits), 10, -14), hex(bits)


def test_float16_to_bfloat16_rounds_half_to_even() -> None:
    finite = EVERY_HALF[(EVERY_HALF & 0x7FFF) < 0x7C00][::37]
    made = floats.cast(finite.view(np.float16), "float16", "bfloat16")
    for half, bits in zip(finite.view(np.float16), made, strict=True):
        assert bfloat16_value(int(bits)) == round_to(Fraction(float(half)), 7, -126)


@pytest.mark.parametrize(("target", "mantissa", "smallest"), [("float16", 10, -14), ("bfloat16", 7, -126)])
def test_float32_rounds_half_to_even(target: str, mantissa: int, smallest: int) -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(2000) * 2.0 ** rng.integers(-26, 4, 2000)).astype(np.float32)
    ties = (np.arange(1, 64, 2, dtype=np.float32) / 64 + 1) * np.float32(2.0**-mantissa) + 1
    values = np.concatenate([values, ties, -ties])
    made = floats.widen(floats.cast(values, "float32", target), target)
    for value, rounded in zip(values, made, strict=True):
        assert Fraction(float(rounded)) == round_to(Fraction(float(value)), mantissa, smallest)


def test_nan_stays_nan() -> None:
    every_one = np.array([0x7FFFFFFF], np.uint32).view(np.float32)
    for target in ("float16", "bfloat16"):
        assert np.isnan(floats.widen(floats.cast(every_one, "float32", target), target))[0]


@pytest.mark.parametrize(
    ("values", "source", "target", "expected"),
    [
        (np.array([1, 65504, -65504], np.float32), "float32", "float16", None),
        (np.array([1, 65519.996], np.float32), "float32", "float16", None),  # rounds down to 65504
        (np.array([1, -65520], np.float32), "float32", "float16", 1),  # halfway: rounds to Inf
        (np.array([1, 65520], np.float32), "float32", "float32", None),
        (np.array([1, 2, np.nan], np.float32), "float32", "float32", 2),
        (np.array([1, -np.inf], np.float16), "float16", "float32", 1),
        (np.array([0x3F80, 0x477F], np.uint16), "bfloat16", "float16", None),  # 65280
        (np.array([0x3F80, 0xC780], np.uint16), "bfloat16", "float16", 1),  # -65536
        (np.array([3.3895314e38, 3.4e38], np.float32), "float32", "bfloat16", 1),
        (np.array([], np.float32), "float32", "float16", None),
    ],
)
def test_first_bad_value(values: npt.NDArray[Any], source: str, target: str, expected: int | None) -> None:
    assert floats.first_bad(values, source, target) == expected
    if expected is None and values.size:
        assert np.isfinite(floats.widen(floats.cast(values, source, target), target)).all()


def test_is_bfloat16() -> None:
    assert floats.is_bfloat16(np.array([1.5, -0.0, 2.0**-133], np.float32))
    assert not floats.is_bfloat16(np.array([1.5, 1 + 2.0**-8], np.float32))
