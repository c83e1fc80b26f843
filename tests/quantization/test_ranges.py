"""The asymmetric formats of 2023, q4f32_0 and q8f16_0, where numbers are odd. Their bytes: test_every_format.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.quantization import asymmetric, floats, outer
from mlcbuild.quantization.floats import BadValue
from mlcbuild.recipes.types import Weights
from tests.quantization import formulas

Q4F32_0 = Weights(4, 32, "uint32", "KN", False, packed_scale_min="bf16x2")


def normal(*shape: int) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(0).standard_normal(shape) * 0.02).astype(np.float32)


@pytest.mark.parametrize("value", [0.0, -0.0, 0.3, -1e-30, 1e-42, 65504.0, -3e38])
def test_an_all_equal_group_decodes_to_its_value(value: float) -> None:
    w = np.full((2, 64), value, np.float32)
    packed = asymmetric.encode(w, "float32", Q4F32_0)
    assert not packed.words.any()  # code 0: the minimum
    assert not (packed.scales & 0xFFFF).any()  # scale 0
    rounded = floats.widen(floats.cast(w, "float32", "bfloat16"), "bfloat16")
    assert np.array_equal(asymmetric.decode(packed, 64, Q4F32_0), rounded)


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
def test_asymmetric_groups_of_many_sizes(source: str) -> None:
    pytest.importorskip("ml_dtypes")
    w = normal(40, 96) * (10.0 ** np.arange(-20, 20, dtype=np.float32)[:, None] if source == "float32" else 1)
    w = w + np.linspace(-1, 1, 40, dtype=np.float32)[:, None] * np.abs(w).max(axis=1, keepdims=True)
    raw = floats.cast(w.astype(np.float32), "float32", source)
    packed = asymmetric.encode(raw, source, Q4F32_0)
    words, pairs = formulas.asymmetric(floats.widen(raw, source))
    assert np.array_equal(packed.words, words) and np.array_equal(packed.scales, pairs)


def test_asymmetric_decode() -> None:
    """code * scale + min, with the stored bfloat16 halves."""
    w = normal(6, 64) + 0.05
    packed = asymmetric.encode(w, "float32", Q4F32_0)
    decoded = asymmetric.decode(packed, 64, Q4F32_0)
    for n in range(6):
        for k in range(64):
            pair = int(packed.scales[n, k // 32])
            scale, least = (np.uint32(half << 16).view(np.float32) for half in (pair & 0xFFFF, pair >> 16))
            code = int(packed.words[n, k // 8]) >> (k % 8 * 4) & 15
            assert decoded[n, k] == np.float32(np.float32(code) * scale) + least
    step = np.ptp(w.reshape(6, 2, 32), axis=2).repeat(32, axis=1) / 15
    assert (np.abs(decoded - w) <= 0.51 * step + np.abs(w).max() / 64).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
def test_asymmetric_bad_values(source: str, bad: float) -> None:
    w = normal(50, 64)
    w[43, 61] = bad
    with pytest.raises(BadValue) as error:
        asymmetric.encode(floats.cast(w, "float32", source), source, Q4F32_0)
    assert error.value.index == 43 * 64 + 61


def test_asymmetric_values_too_far_apart() -> None:
    """Each end is a number, their distance is none in bfloat16."""
    w = normal(3, 32)
    w[1, 4], w[1, 7] = 3e38, -3.1e38
    with pytest.raises(BadValue) as error:
        asymmetric.encode(w, "float32", Q4F32_0)
    assert (error.value.index, error.value.dtype) == (32 + 7, "bfloat16")


def whole(w: npt.NDArray[np.float32], rows: int) -> outer.Map:
    """`each` over pieces of `rows` rows."""

    def through(work: Callable[[npt.NDArray[np.float32], int], Any]) -> Iterator[Any]:
        for start in range(0, len(w), rows):
            yield work(w[start : start + rows], start)

    return through


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30), (1, 9), (9, 1)])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_outer_pieces_make_the_whole(shape: tuple[int, int], rows: int) -> None:
    w = normal(*shape)
    w[0] = 0
    w[:, 0] = 0.5
    found = outer.ranges(*shape, whole(w, rows))
    codes = np.concatenate(list(whole(w, rows)(lambda piece, start: outer.encode(piece, start, found))))
    wanted, *vectors = formulas.outer(w)
    assert np.array_equal(codes, wanted)
    for one, other in zip(found.stored("float16"), vectors, strict=True):
        assert np.array_equal(one, other)


def test_outer_decodes_to_within_a_step() -> None:
    w = normal(60, 40)
    found = outer.ranges(60, 40, whole(w, 16))
    codes = outer.encode(w, 0, found)
    decoded = outer.decode(codes, *found.stored("float16"), "float16")
    step = found.max_in * found.max_out[:, None] / 256
    assert (np.abs(decoded - w) <= 0.51 * step + 2e-4).all()


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_outer_of_equal_values(value: float) -> None:
    w = np.full((4, 6), value, np.float32)
    found = outer.ranges(4, 6, whole(w, 2))
    decoded = outer.decode(outer.encode(w, 0, found), *found.stored("float16"), "float16")
    assert np.array_equal(decoded, w)
