"""Products of many rows with chosen experts, tile by tile (expert_plan.py), on any device and in any format.

A block of threads has rows of x that chose the same expert, and some rows of its matrix. Both come through shared
memory, in float32: a number of the matrix is read and unpacked once for all of the block's rows of x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.gpu import formats
from mlcbuild.compiler.gpu.cuda_rows import launched
from mlcbuild.compiler.gpu.expert_plan import FIELDS, TILE, tile_count
from mlcbuild.compiler.gpu.rows import float32, widened
from mlcbuild.recipes.types import Weights

_WIDTH, _HEIGHT, _DEPTH = 32, 64, 32  # of a block: rows of x, of the matrix, and columns at once, at least
_THREADS, _ACROSS = 128, 16  # of a block; those along the rows of the matrix
# Choices for each expert, on the average, from which a tile costs less than its rows one by one: a number is unpacked
# once, and multiplied with all rows of a tile, whether they are there or not.
_WORTH = 8


@dataclass(frozen=True)
class Product:
    """The buffers and sizes of a product: experts.linear. of_x: choices that share a row of x."""

    x: Any
    order: Any
    tiles: Any
    parts: Mapping[str, Any]
    result: Any
    weights: Weights | None
    dtype: str
    experts: int
    rows: int
    columns: int
    of_x: int

    @property
    def choices(self) -> Any:
        return self.result.shape[0]

    def tile(self, place: Any) -> tuple[Any, Any, Any]:
        """The fields of a tile."""
        expert, first, end = (self.tiles[place, field] for field in range(FIELDS))
        return expert, first, end

    def blocks(self, width: int, height: int) -> tuple[tuple[Any, ...], dict[str, tuple[Any, Any]]]:
        """Variables of blocks of so many rows of x and of the matrix, and how many there are. Those of a tile follow
        each other: what they read of x and of the expert's matrix is in the caches then."""
        block, tile = tirx.Var("bx", "int32"), tirx.Var("by", "int32")
        count = tile_count(self.choices, self.experts) * (TILE // width)
        return (block, tile), {"blockIdx.x": (block, -(-self.rows // height)), "blockIdx.y": (tile, count)}


class Of:
    """One expert's part of a tensor: `part[n, k]` where formats.py has a matrix's own."""

    def __init__(self, tensor: Any, expert: Any) -> None:
        self._tensor, self._expert = tensor, expert

    def __getitem__(self, index: Any) -> Any:
        rest = index if isinstance(index, tuple) else (index,)
        return self._tensor[(self._expert, *rest)]


def few(experts: int) -> int:
    """Up to how many choices rows are better multiplied one by one than by `body`."""
    return _WORTH * experts


def body(p: Product) -> Any:
    """The kernel of all tiles. A block behind its expert's last choice goes through no columns, and stores nothing."""
    step = formats.words(p.weights)
    depth = step * (-(-max(4, _DEPTH // step) // 4) * 4)  # a multiple of four words: each thread has as many numbers
    assert _WIDTH * depth % _THREADS == _HEIGHT * (depth // step) % _THREADS == 0, f"{step} numbers to a word"
    (block, tile), blocks = p.blocks(_WIDTH, _HEIGHT)
    thread = tirx.Var("tx", "int32")
    # A column after the other, a number more to each, so that threads store to different banks.
    of_x = tirx.decl_buffer((depth * (_WIDTH + 1),), "float32", "rows_of_x", scope="shared")
    of_w = tirx.decl_buffer((depth * (_HEIGHT + 1),), "float32", "rows_of_w", scope="shared")
    down, across = _WIDTH * _ACROSS // _THREADS, _HEIGHT // _ACROSS  # sums of a thread
    sums = tirx.decl_buffer((down * across,), "float32", "sums", scope="local")
    expert, first, end = p.tile(tile // (TILE // _WIDTH))
    first = first + tile % (TILE // _WIDTH) * _WIDTH
    read = formats.element({name: Of(part, expert) for name, part in p.parts.items()}, p.weights, p.dtype)
    row, column = thread // _ACROSS, thread % _ACROSS
    with IRBuilder() as builder, T.seq_scope():
        for i in range(down * across):
            T.buffer_store(sums, float32(0), [i])
        with T.serial(tirx.Select(first < end, -(-p.columns // depth), 0)) as o:
            with T.serial(_WIDTH * depth // _THREADS) as i:
                at = i * _THREADS + thread
                place, k = first + at // depth, o * depth + at % depth
                number = p.x[p.order[place] // p.of_x, k]
                there = tirx.all(place < end, k < p.columns)
                value = tirx.if_then_else(there, widened(number), float32(0))
                T.buffer_store(of_x, value, [at % depth * (_WIDTH + 1) + at // depth])
            with T.serial(_HEIGHT * depth // step // _THREADS) as i, T.serial(step) as inner:
                at = i * _THREADS + thread
                low, j = at % (depth // step) * step + inner, at // (depth // step)
                k, n = o * depth + low, block * _HEIGHT + j
                value = tirx.if_then_else(tirx.all(n < p.rows, k < p.columns), widened(read(n, k)), float32(0))
                T.buffer_store(of_w, value, [low * (_HEIGHT + 1) + j])
            T.evaluate(T.tvm_storage_sync("shared"))
            with T.serial(depth) as k:
                for a in range(down):
                    for b in range(across):
                        left = of_x[k * (_WIDTH + 1) + row + a * (_THREADS // _ACROSS)]
                        right = of_w[k * (_HEIGHT + 1) + column + b * _ACROSS]
                        T.buffer_store(sums, sums[a * across + b] + left * right, [a * across + b])
            T.evaluate(T.tvm_storage_sync("shared"))
        for a in range(down):
            for b in range(across):
                place, n = first + row + a * (_THREADS // _ACROSS), block * _HEIGHT + column + b * _ACROSS
                with T.If(tirx.all(place < end, n < p.rows)), T.Then():
                    T.buffer_store(p.result, sums[a * across + b].astype(p.result.dtype), [p.order[place], n])
    return launched(builder.get().body, [sums, of_x, of_w], (thread, _THREADS), blocks)
