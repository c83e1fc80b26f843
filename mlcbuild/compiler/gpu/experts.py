"""Mixtures of experts on GPUs. Arithmetic is float32.

Of a few rows, a product reads the chosen expert's matrix for each token and each of its choices: right for decoding,
which is bound by reading those. Of more, rows are ordered by their experts (expert_plan.py) and multiplied in tiles,
which read the expert's matrix once for all of their rows (cuda_experts.py, expert_tiles.py).
"""

from __future__ import annotations

import functools
from typing import Any

from tvm import IRModule, s_tir, te, tirx
from tvm.script import tirx as T

from mlcbuild.compiler.gpu import cuda_experts, expert_plan, expert_tiles, formats
from mlcbuild.compiler.gpu.device import Device
from mlcbuild.compiler.gpu.expert_plan import FIELDS, tile_count
from mlcbuild.compiler.gpu.expert_tiles import Of
from mlcbuild.compiler.gpu.products import Part
from mlcbuild.compiler.gpu.rows import int64, private, widened
from mlcbuild.compiler.operations import FEW
from mlcbuild.recipes.types import Weights

PRODUCT = "product_of_experts"
_THREADS = 64  # of a block, each of which chooses for one token
_UNROLL = 64
_OPAQUE = 8  # relax's OpPatternKind: nothing is fused with it


@functools.cache
def choose(experts: int, count: int, normalised: bool, scale: float) -> Any:
    """logits [n, experts] float32 -> chosen [n, count] int32, share [n, count] float32."""

    @T.prim_func(s_tir=True, private=True)
    def choose_experts(var_logits: T.handle, var_chosen: T.handle, var_share: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        n = T.int32()
        logits = T.match_buffer(var_logits, (n, experts), "float32")
        chosen = T.match_buffer(var_chosen, (n, count), "int32")
        share = T.match_buffer(var_share, (n, count), "float32")
        for bx in T.thread_binding((n + _THREADS - 1) // _THREADS, thread="blockIdx.x"):
            for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                with T.sblock("choose"):
                    T.reads()
                    T.writes()
                    best = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    taken = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    row: T.let[T.int32] = bx * _THREADS + tx
                    if row < n:
                        for i in range(count):
                            best[0] = -1
                            for e in range(experts):
                                taken[0] = 0
                                for j in range(i):
                                    if chosen[row, j] == e:
                                        taken[0] = 1
                                if taken[0] == 0:
                                    if best[0] < 0:
                                        best[0] = e
                                    else:
                                        if logits[row, e] > logits[row, best[0]]:
                                            best[0] = e
                            chosen[row, i] = best[0]
                        total[0] = T.float32(0)
                        if normalised:
                            for i in range(count):
                                total[0] += T.exp(logits[row, chosen[row, i]] - logits[row, chosen[row, 0]])
                        else:
                            for e in range(experts):
                                total[0] += T.exp(logits[row, e] - logits[row, chosen[row, 0]])
                        for i in range(count):
                            share[row, i] = (
                                T.exp(logits[row, chosen[row, i]] - logits[row, chosen[row, 0]])
                                * T.float32(scale)
                                / total[0]
                            )

    return choose_experts


@functools.cache
def linear(
    parts: tuple[Part, ...],
    weights: Weights | None,
    rows: int,
    in_features: int,
    count: int,
    each: bool,
    dtype: str,
    compute: str,
    device: Device,
) -> Any:
    """x, chosen [n, count], order, tiles, the parts of w [experts, rows, in_features] -> [n * count, rows].

    order, tiles: expert_plan.plan. x and w are of the model `dtype`, the result of `compute`. x: [n, in_features]; with
    `each`, a row of its own for every choice: [n * count, in_features]. Scheduled: how many rows there are decides
    which kernel runs.
    """
    n, experts = tirx.Var("n", "int64"), int(parts[0][1][0])
    pairs = n * int64(count)
    x = te.placeholder((pairs if each else n, int64(in_features)), dtype, "x")
    chosen = te.placeholder((n, int64(count)), "int32", "chosen")
    order = te.placeholder((pairs,), "int32", "order")
    tiles = te.placeholder((tile_count(pairs, experts), int64(FIELDS)), "int32", "tiles")
    given = {name: te.placeholder([int64(int(size)) for size in shape], of, name) for name, shape, of in parts}
    k = te.reduce_axis((int64(0), int64(in_features)), "k")

    def product(p: Any, j: Any) -> Any:
        expert = chosen[p // count, p % count]
        read = formats.element({name: Of(part, expert) for name, part in given.items()}, weights, dtype)
        return te.sum(widened(x[p if each else p // count, k]) * widened(read(j, k)), axis=k)

    total = te.compute((pairs, int64(rows)), product, name=PRODUCT)
    result = te.compute((pairs, int64(rows)), lambda p, j: total[p, j].astype(compute), name="result")
    function = private([x, chosen, order, tiles, *given.values(), result])
    function = tirx.transform.ForceNarrowIndexToInt32()(IRModule({"main": function}))["main"]
    function = _one_by_one(function, device, formats.words(weights))
    x, _, order, tiles, *held, result = function.params
    held = dict(zip(given, held, strict=True))
    sizes = (experts, rows, in_features, 1 if each else count)
    tiled = expert_tiles.Product(x, order, tiles, held, result, weights, dtype, *sizes)
    body, most_few = _by_rows(function.body, tiled, device)
    return function.with_body(body).with_attr("op_pattern", _OPAQUE).with_attr(FEW, most_few)


def _by_rows(one_by_one: Any, product: expert_tiles.Product, device: Device) -> tuple[Any, int]:
    """`one_by_one`, or what is better from a number of choices on; and up to which that is `one_by_one`."""
    own = cuda_experts.bodies(product) if device.kind == "cuda" else []
    most_few = expert_plan.few(product.experts)
    if not own:
        own, most_few = [(None, expert_tiles.body(product))], max(most_few, expert_tiles.few(product.experts))
    (_, body), *rest = reversed(own)
    for most, kernel in [*rest, (most_few, one_by_one)]:
        body = tirx.IfThenElse(tirx.op.tvm_thread_invariant(product.choices <= most), kernel, body)
    return s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", body)), most_few


def _one_by_one(function: tirx.PrimFunc, device: Device, step: int) -> tirx.PrimFunc:
    """A kernel with a block of threads for a few rows of an expert's matrix and one row of x.

    `lanes` threads go along a row of the matrix together, a storage word of `step` numbers each, and add up what they
    have. Blocks that follow each other have other rows of x and the same ones of the matrices, which then come out of
    the caches.
    """
    sch = s_tir.Schedule(function)
    product, result = sch.get_sblock(PRODUCT), sch.get_sblock("result")
    p, j, k = sch.get_loops(product)
    jo, jy = sch.split(j, [None, device.row_groups * device.rows])
    ko, kx, ki = sch.split(k, [None, device.lanes, step])
    sch.reorder(p, jo, jy, kx, ko, ki)
    sch.set_scope(product, 0, "shared")
    sch.reverse_compute_at(result, jy, preserve_unit_loops=True)
    for loop, thread in ((p, "blockIdx.x"), (jo, "blockIdx.y"), (jy, "threadIdx.y"), (kx, "threadIdx.x")):
        sch.bind(loop, thread)
    (*_, last) = sch.get_loops(result)
    _, lane = sch.split(last, [None, device.lanes])
    sch.bind(lane, "threadIdx.x")
    sch.annotate(ko, "pragma_auto_unroll_max_step", _UNROLL)
    sch.annotate(ko, "pragma_unroll_explicit", 1)
    scheduled = sch.mod["main"].with_attr("tirx.is_scheduled", True)
    return scheduled.with_attr("tirx.HoistIfThenElseExprWithBlock", 1)


@functools.cache
def weighted_sum(count: int, width: int, dtype: str) -> Any:
    """x [n * count, width], share [n, count] float32 -> [n, width] as x: rows times shares, added."""
    n = tirx.Var("n", "int64")
    x = te.placeholder((n * int64(count), int64(width)), dtype, "x")
    share = te.placeholder((n, int64(count)), "float32", "share")

    def total(i: Any, j: Any) -> Any:
        terms = [widened(x[i * count + c, j]) * share[i, c] for c in range(count)]
        return sum(terms[1:], terms[0]).astype(dtype)

    return private([x, share, te.compute((n, int64(width)), total, name="weighted_sum")])
