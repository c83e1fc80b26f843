"""Recurrences and the attention of encoders, as WGSL and as SPIR-V on a software device, against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlcbuild.compiler.gpu import encoder, recurrent, state_space
from mlcbuild.models.recurrent.operations import Scanned
from tests.compiler import recurrences
from tests.support.llama import Array

pytestmark = pytest.mark.slow

SEQUENCES, TOKENS = 2, 7
ROWS = SEQUENCES * TOKENS
SIZES = {"n": ROWS, "batch": SEQUENCES}


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_wkv4(gpu: Any) -> None:
    """Channels of more than one block, and one that begins with nothing."""
    width = 133
    given = {"key": 3 * normal(0, ROWS, width), "value": normal(1, ROWS, width), "decay": -np.exp(normal(2, width))}
    given |= {"bonus": normal(3, width), "a": normal(4, SEQUENCES, width)}
    given |= {"b": np.exp(normal(5, SEQUENCES, width)), "m": normal(6, SEQUENCES, width)}
    given["a"][0, 0] = given["b"][0, 0] = 0
    expected, weighted, weights = recurrences.wkv4(*given.values())
    given["m"][0, 0] = -1e30
    given["rates"] = np.concatenate([given.pop("decay"), given.pop("bonus")])
    results = {"out": (ROWS, width), **{f"{name}_after": (SEQUENCES, width) for name in "abm"}}
    given |= {name: np.zeros(shape, np.float32) for name, shape in results.items()}
    got = gpu.launch(recurrent._wkv4(width), 0, given, SIZES)
    np.testing.assert_allclose(got["out"], expected, rtol=1e-4, atol=1e-5)
    scale = np.exp(got["m_after"].astype(np.float64))
    np.testing.assert_allclose(got["a_after"] * scale, weighted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got["b_after"] * scale, weights, rtol=1e-4)


@pytest.mark.parametrize(("dim", "varies"), [(64, False), (20, True)])
def test_wkv(gpu: Any, dim: int, varies: bool) -> None:
    heads = 3
    width = heads * dim
    r, k, v = (normal(seed, ROWS, width) for seed in range(3))
    decay = 1 / (1 + np.exp(normal(3, ROWS if varies else 1, width)))
    bonus, before = normal(4, width), normal(5, SEQUENCES, heads, dim, dim)
    expected, after = recurrences.wkv(r, k, v, decay, bonus, before)
    given = {"r": r, "k": k, "v": v, "decay": decay, "bonus": bonus, "before": before}
    given |= {"out": np.zeros_like(r), "after": np.zeros_like(before)}
    got = gpu.launch(recurrent._wkv(heads, dim, varies), 0, given, SIZES)
    np.testing.assert_allclose(got["out"], expected, atol=2e-5 * dim)
    np.testing.assert_allclose(got["after"], after, atol=1e-4)


@pytest.mark.parametrize(
    ("scanned", "tokens"),
    [
        (Scanned(69, 1, 3, 17, (0.001, 3.0), each=True), 7),
        (Scanned(6, 23, 3, 16, (0.0, float("inf")), each=False), 7),
        (Scanned(2, 40, 1, 33, (0.001, 3.0), each=False), 20),
        (Scanned(2, 64, 1, 128, (0.0, float("inf")), each=False), 1),
        (Scanned(2, 64, 2, 256, (0.0, float("inf")), each=False), 9),
    ],
    ids=["mamba", "mamba2", "chunks", "one", "wide"],
)
def test_scan(gpu: Any, scanned: Scanned, tokens: int) -> None:
    """Steps far below and above zero; states that stay, and such as are gone at once."""
    sizes = (scanned.heads, scanned.dim, scanned.groups, scanned.size, scanned.each)
    given = recurrences.scan_inputs(SEQUENCES, tokens, *sizes)
    expected, after = recurrences.scan(*given, scanned.limits)
    arrays = dict(zip(("x", "step", "bias", "rate", "b", "c", "skip", "before"), given, strict=True))
    arrays |= {"out": np.full_like(given[0], np.nan), "after": np.full_like(given[-1], np.nan)}
    rows = SEQUENCES * tokens
    got = gpu.launch(state_space.scan(scanned), 0, arrays, {"n": rows, "batch": SEQUENCES})
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got["out"], expected, rtol=2e-5, atol=2e-6 * scale)
    np.testing.assert_allclose(got["after"], after, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize(("dim", "biased"), [(20, True), (256, False)])
def test_attention_of_encoders(gpu: Any, dim: int, biased: bool) -> None:
    """Queries of several blocks, keys of several tiles, with holes; a sequence of which nobody sees anything."""
    tokens, heads = 77, 2
    bias, qkv = normal(2, heads, 2 * tokens - 1), normal(0, SEQUENCES * tokens, 3, heads, dim)
    mask = (np.random.default_rng(1).random((SEQUENCES, tokens)) > 0.4).astype(np.int32)
    mask[1] = 0
    given = {"qkv": qkv, "mask": mask, **({"bias": bias} if biased else {})}
    given["out"] = np.full((SEQUENCES * tokens, heads * dim), np.nan, np.float32)
    function = encoder.masked(heads, dim, "float32", 2 * tokens - 1 if biased else 0)
    sizes = {"n": SEQUENCES * tokens, "batch": SEQUENCES, "tokens": tokens}
    got = gpu.launch(function, 0, given, sizes)["out"]
    q, k, v = qkv[:tokens].transpose(1, 2, 0, 3).astype(np.float64)
    scores = q @ k.transpose(0, 2, 1) * dim**-0.5
    if biased:
        scores += bias[:, np.arange(tokens) - np.arange(tokens)[:, None] + tokens - 1]
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * mask[0]
    expected = (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(tokens, -1)
    np.testing.assert_allclose(got[:tokens], expected, atol=1e-5)
    assert np.isfinite(got).all()
