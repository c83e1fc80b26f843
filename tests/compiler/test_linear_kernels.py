"""Matrix products and look-ups of every weight format against NumPy in float64: odd shapes, tails, NaN."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.compiler.cpu.formats import format_of
from mlcbuild.recipes.types import Quantization
from tests.compiler.kernels import LEVELS, LEVELS_HERE, Array, Kernels, rounds_many_rows
from tests.compiler.packing import Packed, pack, rounded, stored
from tests.support.llama import QUANTIZATIONS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are built for x86-64 here"),
]

TOKENS = (*range(1, 10), 64, 67, 130)
SHAPES = ((1, 1), (32, 1), (40, 21), (88, 21), (192, 16), (513, 16), (1000, 35), (1100, 35), (5632, 5))  # (K, N)


class Case:
    """The kernels of one format."""

    def __init__(self, quantization: Quantization, level: str, folder: Path) -> None:
        self.weights, self.dtype = quantization.weights, quantization.model_dtype
        self.form = format_of(self.weights)
        # Codes of a 16-bit model may be multiplied with activations in fixed point of 16 bits (fixed_point.h).
        rough = self.weights is not None and self.dtype != "float32"
        self.bound = 1e-4 if rough else 3e-6
        self.kernels = Kernels(LEVELS[level], folder, self.dtype, [self.form])

    def shape(self, columns: int, rows: int) -> tuple[int, int]:
        """The nearest shape that the format has: AWQ and asymmetric groups are whole."""
        if self.weights is None or self.weights.symmetric or not self.weights.group_size:
            return columns, rows
        size = self.weights.group_size
        return -(-columns // size) * size, -(-rows // 8) * 8

    def pack(self, columns: int, rows: int) -> Packed:
        return pack(normal(rows, columns, seed=1), self.weights, self.dtype)

    def product(self, x: Array, packed: Packed, out_dtype: str = "float32") -> Array:
        return self.kernels.product(self.form, x, packed.parts, len(packed.values), out_dtype)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(got: Array, expected: Array, case: Case) -> None:
    assert np.abs(got.astype(np.float64) - expected).max() <= case.bound * np.abs(expected).max()


# Groups of other sizes than the stock formats have, those that hold whole units of activations and those that do not.
SIZES = {("q4f16_1", 16): "q4f16_g16", ("q4f32_1", 64): "q4f32_g64", ("q4f16_1", 128): "q4f16_g128"}
SIZES |= {("q3f16_1", 20): "q3f16_g20", ("q3f16_1", 30): "q3f16_g30", ("q8f16_1", 128): "q8f16_g128"}


def of_size(quantization: Quantization, group_size: int) -> Quantization:
    assert quantization.weights
    return replace(quantization, weights=replace(quantization.weights, group_size=group_size))


FORMATS = QUANTIZATIONS | {new: of_size(QUANTIZATIONS[name], size) for (name, size), new in SIZES.items()}

# Every format here and with AVX2; where AVX-512 has no VNNI, the formats whose code that changes.
CASES = [(name, level) for level in LEVELS_HERE if level != "x86-64-v4" for name in FORMATS]
CASES += [(name, "x86-64-v4") for name in ("q4f16_1", "q4f32_1", "q4f16_0") if "x86-64-v4" in LEVELS_HERE]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, level = request.param
    return Case(FORMATS[name], level, tmp_path_factory.mktemp(name))


def test_a_product(case: Case) -> None:
    for columns, rows in {case.shape(*shape) for shape in SHAPES}:
        packed = case.pack(columns, rows)
        for tokens in TOKENS:
            x = normal(tokens, columns)
            close(case.product(x, packed), x.astype(np.float64) @ packed.values.astype(np.float64).T, case)


@pytest.mark.parametrize(("name", "bits", "least", "most"), [("q4f32_1", 16, 3e-7, 1e-4), ("q8f32_1", 8, 0, 3e-6)])
def test_activations_are_rounded_as_the_target_says(
    name: str, bits: int, least: float, most: float, tmp_path: Path
) -> None:
    """Where weights have few bits; of few tokens on every CPU. 16 bits are no fewer than a 16-bit model has anyway."""
    quantization = QUANTIZATIONS[name]
    form = format_of(quantization.weights)
    kernels = Kernels(LEVELS["x86-64-v3"], tmp_path, "float32", [form], bits)
    packed, x = pack(normal(32, 1024, seed=1), quantization.weights, "float32"), normal(4, 1024)
    expected = x.astype(np.float64) @ packed.values.astype(np.float64).T
    error = np.abs(kernels.product(form, x, packed.parts, 32) - expected).max() / np.abs(expected).max()
    assert least <= error < most


@pytest.mark.parametrize(("name", "level"), [("q4f32_1", "native"), ("q4f32_1", "x86-64-v3"), ("q4f16_0", "x86-64-v3")])
def test_activations_of_8_bits(name: str, level: str, tmp_path: Path) -> None:
    """32 neighbours share a scale, of few rows and of many; where many rows are not rounded, the headers say so."""
    quantization, cpu = QUANTIZATIONS[name], LEVELS[level]
    assert quantization.weights
    form, dtype = format_of(quantization.weights), quantization.model_dtype
    kernels = Kernels(cpu, tmp_path, dtype, [form], 8)
    many = rounds_many_rows(form, dtype, 8, cpu, tmp_path)
    assert many or level == "native"  # AVX2 does
    packed, x = pack(normal(35, 1100, seed=1), quantization.weights, dtype), normal(67, 1100)
    few = many or quantization.weights.layout == "NK"  # the others always go through tiles
    for tokens, rounds in ((3, few), (67, many)):
        taken = of_8_bits(x[:tokens]) if rounds else x[:tokens].astype(np.float64)
        expected = taken @ packed.values.astype(np.float64).T
        error = np.abs(kernels.product(form, x[:tokens], packed.parts, 35) - expected).max()
        assert error < 1e-6 * np.abs(expected).max()


def of_8_bits(x: Array) -> Array:
    """Every 32 neighbours of x [n, K], or fewer at the end, as whole numbers up to 127 with a scale: float64 [n, K]."""
    padded = np.zeros((len(x), -(-x.shape[1] // 32), 32), np.float32)
    padded.reshape(len(x), -1)[:, : x.shape[1]] = x
    top = np.abs(padded).max(axis=-1, keepdims=True)
    whole = np.rint(padded * (np.float32(127) / top)).astype(np.float64)
    taken: Array = whole * (top / np.float32(127))
    return taken.reshape(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize("level", ["native", "x86-64-v3"])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_row_is_the_same_bits_whatever_it_is_computed_with(level: str, bits: int | None, tmp_path: Path) -> None:
    """Of up to 8 rows: a text that a server writes does not depend on the others."""
    quantization = QUANTIZATIONS["q4f16_1"]
    form = format_of(quantization.weights)
    kernels = Kernels(LEVELS[level], tmp_path, "float16", [form], bits)
    packed, x = pack(normal(35, 1100, seed=1), quantization.weights, "float16"), normal(8, 1100)
    alone = np.concatenate([kernels.product(form, row[None], packed.parts, 35) for row in x])
    for tokens in range(2, 9):
        assert (kernels.product(form, x[:tokens], packed.parts, 35) == alone[:tokens]).all()


def test_activations_of_a_wide_range(case: Case) -> None:
    """A few values are thousands of times larger than the others, as in real models."""
    columns, rows = case.shape(640, 40)
    packed = case.pack(columns, rows)
    x = normal(1, columns)
    x[0, 5::131] *= 3000
    close(case.product(x, packed), x.astype(np.float64) @ packed.values.astype(np.float64).T, case)


def test_activations_and_results_of_the_model_dtype(case: Case) -> None:
    columns, rows = case.shape(192, 24)
    packed = case.pack(columns, rows)
    memory = "uint16" if case.dtype == "bfloat16" else case.dtype
    for tokens in (1, 30):
        x = rounded(normal(tokens, columns), case.dtype)
        wide = case.product(x, packed)
        close(wide, x.astype(np.float64) @ packed.values.astype(np.float64).T, case)
        narrow = case.product(stored(x, case.dtype), packed, memory)
        assert (narrow == stored(rounded(wide, case.dtype), case.dtype)).all()


def test_what_is_not_finite_stays_so(case: Case) -> None:
    columns, rows = case.shape(128, 8)
    packed = case.pack(columns, rows)
    for tokens in (1, 12):
        for bad in (np.nan, np.inf, -np.inf):
            x = normal(tokens, columns)
            x[0, 3] = bad
            got = case.product(x, packed)
            assert not np.isfinite(got[0][packed.values[:, 3] != 0]).any()
            if tokens > 1:
                assert np.isfinite(got[1:]).all()


def test_rows_looked_up(case: Case) -> None:
    if case.form.name.startswith(("minmax", "awq")) or (case.weights and case.weights.layout == "KN"):
        pytest.skip("no embedding has this format")
    columns, rows = case.shape(200, 9)
    packed, ids = case.pack(columns, rows), np.array([3, 0, 3], np.int32)
    y = np.zeros((3, columns), "uint16" if case.dtype == "bfloat16" else case.dtype)
    parts: list[Any] = [*packed.parts, None][:2]
    for i in range(3):
        case.kernels(f"mlcbuild_{case.form.name}_embed", ids, *parts, y, columns, i)
    assert (y == stored(rounded(packed.values[ids], case.dtype), case.dtype)).all()
