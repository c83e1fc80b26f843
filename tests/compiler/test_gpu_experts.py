"""Mixtures of experts on GPUs, on every device that there is here (tests/support/gpus.py), against NumPy."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tvm import relax, te, tirx

from mlcbuild.compiler import operations
from mlcbuild.compiler.gpu import expert_plan, experts, rows
from mlcbuild.compiler.gpu import operations as gpu_operations
from mlcbuild.compiler.gpu.device import device_of
from mlcbuild.models import routers
from mlcbuild.models.weights import Weight
from mlcbuild.quantization.schemes import parts_of
from mlcbuild.recipes.types import Weights
from tests.compiler.packing import pack, rounded
from tests.support.gpus import DEVICES, Gpu
from tests.support.llama import QUANTIZATIONS, Array

pytestmark = pytest.mark.slow

EXPERTS, COUNT, ROWS, COLUMNS = 5, 2, 136, 128  # rows of a matrix: more than any block has
FEW, MANY = 7, 150  # tokens
FIVE_BITS = Weights(5, 48, "uint32", "NK", symmetric=True)
FORMATS = {**QUANTIZATIONS, "5 bits": replace(QUANTIZATIONS["q4f16_1"], weights=FIVE_BITS)}


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def choices(experts: int, count: int, tokens: int) -> Array:
    """Uneven ones [tokens, count], other experts for each choice of a token: all choose expert 1, nobody the first and
    the last but one."""
    random, liked = np.random.default_rng(tokens), [e for e in range(2, experts) if e != experts - 2]
    rest = [random.permutation(liked)[: count - 1] for _ in range(tokens)]
    chosen = [random.permutation([min(1, experts - 1), *more]) for more in rest]
    return np.array(chosen, np.int32).reshape(tokens, count)


def planned(chosen: Array, experts: int) -> tuple[Array, Array]:
    """order and tiles of expert_plan.py."""
    flat, slots = chosen.reshape(-1), expert_plan.tile_count(chosen.size, experts)
    tiles, begin = np.zeros((slots, expert_plan.FIELDS), np.int32), 0
    for e in range(experts):
        end = begin + int((flat == e).sum())
        for at, first in enumerate(range(begin, end, expert_plan.TILE)):
            tiles[begin // expert_plan.TILE + e + at] = e, first, end
        begin = end
    return np.argsort(flat, kind="stable").astype(np.int32), tiles


@pytest.mark.parametrize("normalised", [False, True])
def test_the_likeliest_experts_are_chosen(gpu: Gpu, normalised: bool) -> None:
    logits = floats(70, 60) * 3
    logits[3, 5] = logits[3, 4] = 20  # of equal ones the first
    (kernel,) = gpu.kernels(experts.choose(60, 6, normalised, 2.5))
    given = {"logits": logits, "chosen": np.zeros((70, 6), np.int32), "share": np.zeros((70, 6), np.float32)}
    got = kernel.run((2, 1, 1), given, {"n": 70})
    probability = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    expected = np.argsort(-probability, axis=1, kind="stable")[:, :6]
    assert (got["chosen"] == expected).all()
    shares = np.take_along_axis(probability, expected, 1)
    shares = 2.5 * (shares / shares.sum(1, keepdims=True) if normalised else shares)
    assert np.abs(got["share"] - shares).max() < 1e-5


@pytest.mark.parametrize(("experts", "count", "tokens"), [(5, 2, 150), (300, 3, 700), (1, 1, 129), (4, 1, 33)])
def test_tokens_are_ordered_by_their_experts(gpu: Gpu, experts: int, count: int, tokens: int) -> None:
    """Of each, as they come; no tile has two experts, and none is padded to the largest."""
    chosen = choices(experts, count, tokens)
    order, tiles = planned(chosen, experts)
    scratch = np.full((expert_plan.parts(chosen.size), experts), -1, np.int32)
    given = {"chosen": chosen, "order": order * 0, "tiles": np.full(tiles.shape, -1, np.int32), "counts": scratch}
    function = expert_plan.plan(experts, count, 0)
    for which in (0, 1):
        given |= gpu.launch(function, which, given, {"n": tokens})
    np.testing.assert_array_equal(given["order"], order)
    there = given["tiles"][:, 1] < given["tiles"][:, 2]
    np.testing.assert_array_equal(given["tiles"][there], tiles[tiles[:, 1] < tiles[:, 2]])
    assert there.sum() == sum(-(-int((chosen == e).sum()) // expert_plan.TILE) for e in range(experts))


@pytest.mark.parametrize(
    ("name", "each"),
    [
        *((name, False) for name in ("q0f32", "q0f16", "q4f16_1", "q3f16_1", "q4f32_0", "q4f16_autoawq")),
        *((name, False) for name in ("q3f16_0_2023", "5 bits")),  # five and six numbers to a word
        ("q4f16_1", True),
    ],
)
def test_each_row_is_multiplied_with_the_experts_that_it_chose(gpu: Gpu, name: str, each: bool) -> None:
    """A few rows one by one; many in tiles, some of them partial."""
    quantization = FORMATS[name]
    weights, dtype = quantization.weights, quantization.model_dtype
    if gpu.name == "wgsl" and weights is not None and weights.storage_dtype != "uint32":
        pytest.skip("WGSL has no integers of 16 bits")
    if weights is not None and weights.scheme == "group":
        weights = replace(weights, layout="NK")
    packed = pack(floats(EXPERTS, ROWS, COLUMNS), weights, dtype)
    shape = (EXPERTS, ROWS, COLUMNS)
    described = (("weight", shape, dtype),) if weights is None else tuple(
        (part.form, part.shape, part.dtype) for part in parts_of(shape, weights, dtype)
    )  # fmt: skip
    arrays = {part: array for (part, *_), array in zip(described, packed.parts, strict=True)}
    device = device_of(gpu.TARGET)
    function = gpu.scheduled(experts.linear(described, weights, ROWS, COLUMNS, COUNT, each, dtype, dtype, device))
    tiled = len(gpu.kernels(function)) - 1
    own = gpu.kind == "cuda" and name in ("q0f16", "q4f16_1", "q3f16_1")
    assert tiled == (2 if own and name != "q3f16_1" else 1)  # 3 bits have one size of blocks
    assert function.attrs[operations.FEW] == (1 if own else 8) * EXPERTS
    values = packed.values.astype(np.float64)
    for which, tokens in enumerate((FEW, *[MANY] * tiled)):
        chosen = choices(EXPERTS, COUNT, tokens)
        x = rounded(floats(tokens * COUNT if each else tokens, COLUMNS, seed=2), dtype)
        order, tiles = planned(chosen, EXPERTS)
        given = {"x": x.astype(dtype), "chosen": chosen, "order": order, "tiles": tiles, **arrays}
        given["result"] = np.full((tokens * COUNT, ROWS), np.nan, dtype)
        got = gpu.launch(function, which, given, {"n": tokens})["result"]
        rows = x if each else x.repeat(COUNT, axis=0)
        expected = np.einsum("pk,pnk->pn", rows.astype(np.float64), values[chosen.reshape(-1)])
        assert np.abs(got - expected).max() < (2e-3 if dtype == "float16" else 1e-5) * np.abs(expected).max()


@pytest.mark.parametrize(
    ("target", "names", "most"),
    [
        ("cuda", ("q4f16_1", "q4f16_1"), [EXPERTS]),
        ("cuda", ("q4f16_1", "5 bits"), [EXPERTS, 8 * EXPERTS]),  # what our own functions read, and what they do not
        ("metal", ("q4f16_1", "5 bits"), [8 * EXPERTS]),
    ],
)
def test_a_plan_is_made_where_its_products_read_it(target: str, names: tuple[str, ...], most: list[int]) -> None:
    device = device_of(next(each.TARGET for each in DEVICES if each.name == target))
    builder, n = relax.BlockBuilder(), tirx.Var("n", "int64")
    make = operations.operations(builder, "float16", gpu_operations.factories("float16", device))
    x, chosen = (
        relax.Var("x", relax.TensorType([n, 128], "float16")),
        relax.Var("chosen", relax.TensorType([n, COUNT], "int32")),
    )
    with builder.function("main", [x, chosen]):
        for name in names:
            packing = FORMATS[name].weights
            assert packing is not None
            parts = parts_of((EXPERTS, ROWS, 128), packing, "float16")
            held: dict[str, Any] = {
                part.form: relax.Var(part.form, relax.TensorType(list(part.shape), part.dtype)) for part in parts
            }
            made = make.expert_linear(x, chosen, Weight(held, packing, ROWS))
        builder.emit_func_output(made)
    plans = [f for gv, f in builder.get().functions_items() if gv.name_hint.startswith("plan_experts")]
    assert sorted(int(re.findall(r"if n \* 2 > (\d+)", plan.script())[0]) for plan in plans) == most


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_the_experts_say_is_added_by_their_shares(gpu: Gpu, dtype: str) -> None:
    x, share = rounded(floats(3 * 4, 37), dtype), floats(3, 4, seed=1)
    function = gpu.scheduled(experts.weighted_sum(4, 37, dtype))
    given = {"x": x.astype(dtype), "share": share, "weighted_sum": np.zeros((3, 37), dtype)}
    got = gpu.launch(function, 0, given, {"n": 3})["weighted_sum"]
    expected = np.einsum("nck,nc->nk", x.reshape(3, 4, 37), share)
    assert np.abs(got - expected).max() < (3e-3 if dtype == "float16" else 1e-5)


def test_the_experts_of_the_first_ranks(gpu: Gpu) -> None:
    """Of a row whose ranks are in disorder, experts that exist."""
    rank = np.stack([*(np.random.default_rng(i).permutation(9) for i in range(3)), np.full(9, 8)]).astype(np.int32)
    given = te.placeholder((tirx.Var("n", "int32"), 9), "int32", "rank")
    function = gpu.scheduled(rows.private([given, routers._chosen(given, 3)]))
    arrays = {"rank": rank, "router_chosen": np.full((4, 3), -1, np.int32)}
    got = gpu.launch(function, 0, arrays, {"n": 4})["router_chosen"]
    np.testing.assert_array_equal(got, [*np.argsort(rank[:3], 1)[:, :3], [0, 0, 0]])
