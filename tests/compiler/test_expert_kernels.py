"""The kernels of experts against NumPy in float64, in every weight format: few and many rows, experts nobody chose."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest

from mlcbuild.compiler.cpu.formats import format_of
from tests.compiler.kernels import LEVELS, Array, Kernels
from tests.compiler.packing import pack
from tests.support.llama import QUANTIZATIONS

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are built for x86-64 here")

ROWS, COLUMNS, COUNT = 72, 128, 2
DIFFERENT = ("q0f32", "q0bf16", "q3f16_1", "q4f16_1", "q4f32_1", "q4f32_0", "q8f16_0", "q4f16_autoawq")


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(got: Array, expected: Array, bound: float = 3e-6) -> None:
    assert np.abs(got - expected).max() <= bound * np.abs(expected).max()


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(LEVELS["native"], tmp_path_factory.mktemp("experts"), "float32", [format_of(None)])


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("experts", [4, 60])
def test_each_row_is_multiplied_with_the_experts_that_it_chose(name: str, experts: int, tmp_path: Path) -> None:
    quantization = QUANTIZATIONS[name]
    form = format_of(quantization.weights)
    kernels = Kernels(LEVELS["native"], tmp_path, quantization.model_dtype, [form])
    packed = [
        pack(normal(ROWS, COLUMNS, seed=e), quantization.weights, quantization.model_dtype) for e in range(experts)
    ]
    parts = [np.stack(part) for part in zip(*(each.parts for each in packed), strict=True)]
    weights = np.stack([each.values for each in packed]).astype(np.float64)
    for tokens in (1, 3, 40, 230):
        choices = np.random.default_rng(tokens).permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)
        choices[choices == 1] = 0  # nobody chooses the second one
        chosen = choices[:, :COUNT].astype(np.int32)
        for x in (normal(tokens, COLUMNS), normal(tokens * COUNT, COLUMNS)):
            rows = x if len(x) > tokens or COUNT == 1 else x.repeat(COUNT, axis=0)
            expected = np.einsum("pk,pnk->pn", rows.astype(np.float64), weights[chosen.reshape(-1)])
            got = kernels.product_of_experts(form, x, np.ascontiguousarray(chosen), parts, ROWS)
            # Products with codes take the activations of a 16-bit model in 16 bits (fixed_point.h).
            close(got, expected, 1e-4 if quantization.model_dtype == "float16" else 3e-6)


@pytest.mark.parametrize("normalised", [False, True])
def test_the_likeliest_experts_are_chosen_and_their_probabilities_are_their_shares(
    kernels: Kernels, normalised: bool
) -> None:
    logits = normal(50, 60) * 3
    chosen, share = np.zeros((50, 6), np.int32), np.zeros((50, 6), np.float32)
    for row in range(50):
        kernels("mlcbuild_choose_experts", logits, chosen, share, row, 60, 6, np.int32(normalised), 2.5)
    probability = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    expected = np.argsort(-probability, axis=1)[:, :6]
    assert (chosen == expected).all()
    shares = np.take_along_axis(probability, expected, 1)
    close(share, 2.5 * (shares / shares.sum(1, keepdims=True) if normalised else shares))


def test_of_equal_experts_the_first_are_chosen_and_nan_chooses_too_but_counts_for_nan(kernels: Kernels) -> None:
    logits = np.array([[1, 2, 2, 0, 2], [np.nan, 3, np.nan, 4, 1], [np.nan] * 5], np.float32)
    chosen, share = np.zeros((3, 3), np.int32), np.zeros((3, 3), np.float32)
    for row in range(3):
        kernels("mlcbuild_choose_experts", logits, chosen, share, row, 5, 3, np.int32(0), 1.0)
    assert chosen[0].tolist() == [1, 2, 4]
    assert all(sorted(set(row.tolist())) == sorted(row.tolist()) for row in chosen)
    assert np.isfinite(share[0]).all() and np.isnan(share[1:]).all()


def test_what_the_experts_say_is_added_by_their_shares(kernels: Kernels) -> None:
    x, share = normal(3 * 4, 37), normal(3, 4, seed=1)
    y = np.zeros((3, 37), np.float32)
    for row in range(3):
        kernels("mlcbuild_weighted_sum", x, share, y, row, 4, 37)
    close(y, np.einsum("nck,nc->nk", x.reshape(3, 4, 37).astype(np.float64), share))


def test_tasks_are_handed_over_with_64_bits() -> None:
    """Of a number with 32 bits on the stack, the kernels, which read 64, would see what lay beside it."""
    import tvm

    from mlcbuild.compiler.cpu import experts

    function = experts.linear(format_of(None), (((4, 24, 64), "float32"),), 24, 64, COUNT, False)
    built = tvm.tirx.build(tvm.IRModule({"f": function.with_attr("global_symbol", "f")}), target="llvm")
    calls = [line for line in built.inspect_source().splitlines() if "call void @mlcbuild_" in line]
    assert len(calls) >= 4
    assert not [line for line in calls if ", i32 %" in line]
