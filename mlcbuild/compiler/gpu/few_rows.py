"""The schedule of a matrix product with few rows of x: all the time goes into reading the matrix, once.

A block of threads takes `row_groups * rows` rows of the matrix. `lanes` threads go along a row together, a storage word
of the matrix each, so that neighbouring threads read neighbouring words; x is read once for `rows` rows. Sums are kept
in registers and added up across the lanes at the end: by shuffles where the lanes are a warp, else through shared
memory.
"""

from __future__ import annotations

from typing import Any

from tvm import DataType, ir, s_tir, tirx

from mlcbuild.compiler.gpu.device import Device
from mlcbuild.compiler.gpu.inlining import inline_consumers, inline_producers
from mlcbuild.compiler.gpu.products import PRODUCT

_UNROLL = 64


def few_rows(function: tirx.PrimFunc, device: Device, count: int, step: int) -> tirx.PrimFunc:
    """`function` with `count` rows of x to a block of threads, any number of them in all.

    `step` is how many neighbouring columns a thread takes at a time: those of a storage word.
    """
    sch = s_tir.Schedule(function)
    product = sch.get_sblock(PRODUCT)
    columns = int(sch.get(sch.get_loops(product)[2]).extent)
    lanes = min(device.lanes, _power_of_two(-(-columns // step)))
    sch.pad_einsum(product, [count, device.row_groups * device.rows, lanes * step])
    x, w = (sch.cache_read(product, index, "local") for index in (0, 1))
    last = inline_consumers(sch, product) or sch.cache_write(product, 0, "local")

    i, j, k = sch.get_loops(product)
    io, ii = sch.split(i, [None, count])
    jo, jy, ji = sch.split(j, [None, device.row_groups, device.rows])
    ko, kx, ki = sch.split(k, [None, lanes, step])
    sch.reorder(io, jo, jy, ji, ii, kx, ko, ki)
    partial = sch.rfactor(kx, 2)

    io, jo, jy, ji, ii, kx, ko, ki = sch.get_loops(partial)
    sch.reorder(io, jo, jy, kx, ko, ki, ji, ii)
    sch.set_scope(partial, 0, "local")
    for loop, thread in ((io, "blockIdx.y"), (jo, "blockIdx.x"), (jy, "threadIdx.y"), (kx, "threadIdx.x")):
        sch.bind(loop, thread)
    # Several words of a row on their way at once: that many loads hide each other's latency.
    ahead = _divisor(int(sch.get(ko).extent), device.ahead)
    ko, ku = sch.split(ko, [None, ahead])
    sch.unroll(ku)
    for cache in (x, w):
        sch.compute_at(cache, ku, preserve_unit_loops=True)
        inline_producers(sch, cache)
        _vectorize(sch, cache, device, step)
    sch.annotate(ko, "pragma_auto_unroll_max_step", _UNROLL)
    sch.annotate(ko, "pragma_unroll_explicit", 1)
    sch.decompose_reduction(partial, ko)

    sch.reverse_compute_at(product, jy, preserve_unit_loops=True)
    over, row, of_x = sch.get_loops(product)[-3:]
    sch.reorder(row, of_x, over)
    sch.bind(over, "threadIdx.x")
    sch.set_scope(product, 0, "local")
    sch.reverse_compute_at(last, jy, preserve_unit_loops=True)
    return sch.mod["main"]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _divisor(number: int, most: int) -> int:
    """The largest power of two up to `most` that divides `number`."""
    while number % most:
        most //= 2
    return most


def _vectorize(sch: Any, cache: Any, device: Device, step: int) -> None:
    """Read x at once where it is read as it is: packed words are, as they are one word."""
    block = sch.get(cache)
    value = block.body.value if isinstance(block.body, tirx.BufferStore) else None
    value = value.value if isinstance(value, tirx.Cast) else value
    if not isinstance(value, ir.TensorLoad):
        return
    width = min(step, device.vector // DataType(str(value.source.dtype)).itemsize)
    if width > 1 and step % width == 0:
        _, inner = sch.split(sch.get_loops(cache)[-1], [None, width])
        sch.vectorize(inner)
