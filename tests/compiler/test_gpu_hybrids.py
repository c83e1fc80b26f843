"""The recurrences of hybrids on every device, against NumPy in float64 (tests.compiler.recurrences)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.compiler.gpu import delta, lru, mlstm, sources, state_space
from mlcbuild.models.recurrent.operations import Scanned
from tests.compiler import recurrences
from tests.compiler.test_gpu_lowering import CUDA
from tests.support import device_code, sass
from tests.support.gpus import Gpu
from tests.support.llama import Array

pytestmark = pytest.mark.slow


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("heads", "groups", "keys", "dim", "each", "tokens"),
    [
        (4, 2, 24, 20, False, 7),
        (3, 3, 21, 67, True, 11),
        (5, 1, 128, 33, False, 1),
        (2, 2, 128, 33, True, 1),
        (2, 1, 128, 64, False, 33),
        (1, 1, 256, 64, True, 5),
    ],
)
def test_delta(gpu: Gpu, heads: int, groups: int, keys: int, dim: int, each: bool, tokens: int) -> None:
    """Rows and columns that fill no block; more tokens than are taken at once, of two sequences; one token."""
    given = recurrences.delta_inputs(2, tokens, heads, groups, keys, dim, each)
    check_delta(gpu, given, groups)


@pytest.mark.parametrize("each", [False, True])
def test_delta_of_any_decay(gpu: Gpu, each: bool) -> None:
    """Nothing, next to nothing and all, next to each other; writing that turns what is there round."""
    x, decay, beta, state = recurrences.delta_inputs(1, 20, 2, 2, 32, 32, each)
    decay = np.random.default_rng(4).choice(recurrences.EXTREMES, decay.shape)
    check_delta(gpu, (x, decay, 2 * beta, state), 2)


def check_delta(gpu: Gpu, given: recurrences.Delta, groups: int) -> None:
    x, decay, beta, state = given
    sequences, heads, keys, dim = state.shape
    results = {"out": np.full((len(x), heads * dim), np.nan, np.float32), "after": np.full_like(state, np.nan)}
    arrays = {"x": x, "decay": decay, "beta": beta, "before": state, **results}
    function = delta.delta(Scanned(heads, dim, groups, keys, (0.0, 0.0), decay.shape[2] > 1))
    got = gpu.launch(function, 0, arrays, {"n": len(x), "batch": sequences})
    expected, held = recurrences.delta(*given, groups)
    np.testing.assert_allclose(got["out"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["after"], held, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("heads", "keys", "dim", "tokens"), recurrences.MLSTM)
def test_mlstm(gpu: Gpu, heads: int, keys: int, dim: int, tokens: int) -> None:
    """Rows and columns that fill no block, the last column alone in one; more tokens than are read at a time."""
    sequences = 2
    x, gates, memory, top = recurrences.mlstm_inputs(sequences, tokens, heads, keys, dim)
    out = np.full((sequences * tokens, heads, dim + 1), np.nan, np.float32)
    given = {"x": x, "gates": gates, "before": memory, "top": top, "out": out}
    given |= {"after": np.full_like(memory, np.nan), "top_after": np.full_like(top, np.nan)}
    function = mlstm.mlstm(Scanned(heads, dim, heads, keys, (0.0, 0.0), False))
    got = gpu.launch(function, 0, given, {"n": sequences * tokens, "batch": sequences})
    recurrences.check_mlstm((x, gates, memory, top), got["out"], got["after"], got["top_after"])


@pytest.mark.parametrize(
    ("kernel_of", "scanned"),
    [
        (delta.delta, Scanned(32, 128, 16, 128, (0.0, 0.0), False)),
        (delta.delta, Scanned(32, 128, 16, 128, (0.0, 0.0), True)),
        (mlstm.mlstm, Scanned(8, 512, 8, 256, (0.0, 0.0), False)),  # xLSTM 7B's
        (state_space.scan, Scanned(64, 64, 1, 128, (0.0, float("inf")), False)),
    ],
    ids=["delta", "kda", "mlstm", "mamba2"],
)
def test_states_of_matrices_stay_in_registers(kernel_of: Any, scanned: Scanned, tmp_path: Path) -> None:
    code, blocks = device_code.source(kernel_of(scanned), CUDA)
    (kernel,) = (sass.kernels(sources.complete(code), "sm_90", tmp_path)[name] for name in blocks)
    assert kernel.registers <= 128
    assert {name for name in kernel.counted() if name in ("LDL", "STL")} == set()


def test_delta_of_a_key_that_is_nothing(gpu: Gpu) -> None:
    """A key of zeros maps to nothing and changes nothing: no number is divided by zero."""
    heads, size = 1, 16
    x, state = np.zeros((1, 3 * size), np.float32), normal(1, 1, heads, size, size)
    one = np.ones((1, 1), np.float32)
    given = {"x": x, "decay": one, "beta": one, "before": state, "out": one * np.full(size, np.nan, np.float32)}
    function = delta.delta(Scanned(heads, size, 1, size, (0.0, 0.0), False))
    got = gpu.launch(function, 0, {**given, "after": np.full_like(state, np.nan)}, {"n": 1, "batch": 1})
    np.testing.assert_array_equal(got["after"], state)
    np.testing.assert_array_equal(got["out"], 0)


@pytest.mark.parametrize(("heads", "width", "rows"), [(3, 20, 5), (1, 257, 1)])
def test_lru_gates(gpu: Gpu, heads: int, width: int, rows: int) -> None:
    x, w, bias = normal(0, rows, heads * width), normal(1, heads, width, width) / width**0.5, normal(2, heads * width)
    given = {"x": x, "w": w, "bias": bias, "out": np.full_like(x, np.nan)}
    got = gpu.launch(lru.gates(heads, width), 0, given, {"n": rows})["out"]
    np.testing.assert_allclose(got, recurrences.lru_gates(x, w, bias), rtol=1e-5, atol=1e-6)


def test_lru(gpu: Gpu) -> None:
    width = 80
    x, decay, before = normal(0, 6, width), 1 / (1 + np.exp(normal(1, 6, width))), normal(2, 2, width)
    given = {"x": x, "decay": decay, "before": before, "out": np.full_like(x, np.nan)}
    got = gpu.launch(lru.lru(width), 0, {**given, "after": np.full_like(before, np.nan)}, {"n": 6, "batch": 2})
    out, after = recurrences.lru(x, decay, before)
    np.testing.assert_allclose(got["out"], out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["after"], after, rtol=1e-5, atol=1e-6)
