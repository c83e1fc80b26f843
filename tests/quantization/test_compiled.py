"""The kernel in C writes the bytes of the NumPy one, which test_group_packing.py holds against the formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.quantization import compiled, floats, group
from mlcbuild.quantization.floats import BadValue
from mlcbuild.recipes.types import Weights

Q4 = Weights(bits=4, group_size=32, storage_dtype="uint32", layout="NK", symmetric=True)
FORMATS = {
    "4 bits": Q4,
    "4 bits, 2023": replace(Q4, scale_floor=1e-4),
    "3 bits": Weights(3, 40, "uint32", "NK", True),
    "3 bits, uint16, 2023": Weights(3, 40, "uint16", "NK", True, scale_floor=1e-4),
    "8 bits": Weights(8, 32, "uint32", "NK", True),
    "4 bits, group 128": Weights(4, 128, "uint32", "NK", True),
    "5 bits, bytes": Weights(5, 8, "uint8", "NK", True),
}
DTYPES = ["float16", "bfloat16", "float32"]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> compiled.Compiled:
    return compiled.Compiled(tmp_path_factory.mktemp("kernels"))


def same(rows: npt.NDArray[Any], source: str, weights: Weights, model_dtype: str, kernels: compiled.Compiled) -> None:
    one, other = group.encode(rows, source, weights, model_dtype), kernels.encode(rows, source, weights, model_dtype)
    assert np.array_equal(one.words, other.words)
    assert np.array_equal(one.scales.view(np.uint8), other.scales.view(np.uint8))


def edges(weights: Weights, dtype: str) -> npt.NDArray[Any]:
    """Rows that reach every branch: each 16-bit number as a largest weight, and the weights around each step."""
    if dtype == "float32":
        largest = np.random.default_rng(0).uniform(1e-38, 1, 4000).astype(np.float32)
        largest *= np.float32(10.0) ** np.random.default_rng(1).integers(-38, 4, 4000)
    else:
        bits = np.arange(0, 0x7C00 if dtype == "float16" else 0x4780, 3, dtype=np.uint16)
        largest = floats.widen(bits.view(floats.STORAGE[dtype]), dtype)
    m = 2 ** (weights.bits - 1) - 1
    steps = np.resize(np.arange(-m - 0.5, m + 1, 0.5, dtype=np.float32), weights.group_size - 1)
    with np.errstate(all="ignore"):
        rows = np.concatenate([largest[:, None], (largest / np.float32(m))[:, None] * steps], axis=1)
    rows = np.clip(np.nan_to_num(rows), -largest[:, None], largest[:, None])
    near = floats.cast(rows, "float32", dtype).view(f"i{floats.STORAGE[dtype].itemsize}")
    nudged = near + np.random.default_rng(2).integers(-1, 2, near.shape)
    nudged = np.where((near & np.iinfo(near.dtype).max) > 1, nudged, near)
    return nudged.astype(near.dtype).view(floats.STORAGE[dtype])


@pytest.mark.parametrize("model_dtype", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("name", ["4 bits", "3 bits", "8 bits"])
def test_edges(name: str, source: str, model_dtype: str, kernels: compiled.Compiled) -> None:
    rows = edges(FORMATS[name], source)
    finite = np.abs(floats.widen(rows, source)) < 65000
    same(np.where(finite, rows, np.zeros_like(rows)), source, FORMATS[name], model_dtype, kernels)


@pytest.mark.parametrize("name", FORMATS)
def test_partial_groups_and_odd_addresses(name: str, kernels: compiled.Compiled) -> None:
    rng = np.random.default_rng(3)
    for size in (1.0, 1e-5, 1e-7):
        for k in (1, 37, 96, 200):
            values = (rng.standard_normal((30, k)) * size).astype(np.float16)
            values[3] = 0
            same(values, "float16", FORMATS[name], "float16", kernels)
            shifted = np.empty(values.nbytes + 1, np.uint8)[1:].view(np.float16).reshape(values.shape)
            shifted[:] = values
            same(shifted, "float16", FORMATS[name], "float16", kernels)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65520.0])
@pytest.mark.parametrize("source", ["bfloat16", "float32"])
def test_bad_values(source: str, bad: float, kernels: compiled.Compiled) -> None:
    values = np.ones((50, 70), np.float32)
    values[43, 69] = bad
    with pytest.raises(BadValue) as error:
        kernels.encode(floats.cast(values, "float32", source), source, Q4, "float16")
    assert (error.value.index, error.value.dtype) == (43 * 70 + 69, "float16")


def test_without_a_compiler_numpy_does_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "group.c"
    source.write_text("#error not today\n")
    monkeypatch.setattr(compiled, "_SOURCE", source)
    notes: list[str] = []
    kernels = compiled.Compiled(tmp_path, notes.append)
    for _ in range(2):
        same(np.ones((3, 32), np.float16), "float16", Q4, "float16", kernels)
    assert len(notes) == 1 and "the kernel could not be compiled" in notes[0] and "not today" in notes[0]
