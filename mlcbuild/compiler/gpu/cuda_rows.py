"""Products of few rows of x on CUDA devices: the function of kernels/few_rows.cuh for a shape, and TIR around it.

What follows a product (a bias, a residual) stays TIR: it is applied to the sums that the function gives each thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, tirx

from mlcbuild.compiler.gpu.inlining import inline_consumers
from mlcbuild.quantization.schemes import elements_per_word, max_code
from mlcbuild.recipes.types import Weights

FORMAT = "mlcbuild.format"  # annotation of a product's block: the C++ type of its matrix
COUNTS = (1, 8, 32)  # rows of x that there are functions for: up to so many
TYPES = {"float16": "half", "bfloat16": "nv_bfloat16", "float32": "float"}
_CODES = {(8, 4): 7, (10, 3): 3, (4, 8): 127}  # (codes of a word, bits): the code of 0
_WORDS, _LANES = 4, 4  # words of a load; lanes along a row
MULTIPROCESSORS, _WARPS = 132, 12  # of the largest device (H100), and what each shall have of a product at least
_NORMED_WARPS = 8  # the same of one that norms x first, of which every block does all
_MOST_UNITS = 16  # units of two words' columns that a thread norms: registers
_SHARED = 48 * 1024  # bytes of a block
_MOST_WARPS, _MOST_LARGE = 16, 8  # of a block; of one whose threads need more than 128 registers, or 32 KB are shared


@dataclass(frozen=True)
class Instance:
    """The function of one product: template arguments of `few_rows`, and what it asks of its caller."""

    arguments: str
    rows: int  # of the matrix, of a block
    threads: int
    results: int  # of a thread
    shared: int  # floats
    ahead: int  # steps of a warp whose loads are on their way
    function: str = "few_rows"

    @property
    def name(self) -> str:
        return f"mlcbuild::{self.function}<{self.arguments}>"


def format_of(weights: Weights | None, dtype: str) -> dict[str, Any]:
    """Annotations for a product whose x is of `dtype`, the model dtype; none where no function reads the format."""
    if weights is None:
        return {FORMAT: f"16, 0, false of {dtype}"} if dtype != "float32" else {}
    per_word = elements_per_word(weights)
    known = weights.scheme == "group" and weights.symmetric and weights.storage_dtype == "uint32"
    if not known or _CODES.get((per_word, weights.bits)) != max_code(weights):
        return {}
    transposed = str(weights.layout == "KN").lower()
    return {FORMAT: f"{weights.bits}, {weights.group_size}, {transposed} of {dtype}"}


@dataclass(frozen=True)
class Matrix:
    """What functions know of a matrix: `given` are its C++ type's arguments, `padded` the columns that are stored."""

    given: str
    dtype: str
    bits: int
    per_word: int
    group: int  # 0 where there are no scales
    across: bool
    padded: int

    @property
    def wide(self) -> bool:
        return self.dtype == "float32"

    @property
    def type(self) -> str:
        return f"mlcbuild::Weights<{TYPES[self.dtype]}, {self.given}>"


def matrix(form: str, rows: int | None, columns: int) -> Matrix | None:
    """A matrix [rows, columns] in a format that `format_of` gave, or None where no function reads it.

    `rows` is None where it is known at run time only.
    """
    given, _, dtype = form.partition(" of ")
    bits, group, transposed = given.split(", ")
    per_word = {"16": 2, "8": 4, "4": 8, "3": 10}[bits]
    chunk = _WORDS * per_word
    padded = -(-columns // (int(group) or chunk)) * (int(group) or chunk)
    aligned = 8 if per_word % 4 else 16
    across = transposed == "true"
    if padded % chunk or columns * (4 if dtype == "float32" else 2) % aligned:
        return None
    if not int(group) and columns % chunk:  # rows of plain numbers are not filled up
        return None
    if across and (rows is None or rows % _WORDS):
        return None
    return Matrix(given, dtype, int(bits), per_word, int(group), across, padded)


def instance(form: str, rows: int | None, columns: int, most: int, normed: bool = False) -> Instance | None:
    """The function for a matrix of `matrix`, or None where there is none.

    `most` are the rows of x: 1, or a multiple of 8. `normed`: x is normed while the first loads are on their way.
    """
    of = matrix(form, rows, columns)
    if of is None or (of.wide and most > 8):
        return None
    tiles = 2 if of.across or (most > 1 and not of.wide and _blocks(rows, 2) >= 2 * MULTIPROCESSORS) else 1
    steps = -(-(of.padded // (_WORDS * of.per_word)) // _LANES)
    warps = _warps(_blocks(rows, tiles), steps, _MOST_LARGE if of.wide or most > 8 else _MOST_WARPS, normed)
    each = -(-steps // warps)
    ahead = _ahead(each, tiles, normed)
    arguments = f"{of.type}, {columns}, {most}, {tiles}, {warps}, {ahead}"
    height, threads = 16 * tiles, 32 * warps
    return Instance(arguments, height, threads, -(-height * most // threads), warps * height * most, ahead)


def fused(form: str, rows: int, columns: int, most: int, normed: bool, paired: bool) -> Instance | None:
    """The function that norms one row of x first, or pairs the rows of a gate with those of its other half, or both."""
    plain = instance(form, rows, columns, most, normed)
    of = matrix(form, rows, columns)
    if normed and of is not None and of.padded > _MOST_UNITS * 2 * of.per_word * (plain.threads if plain else 0):
        return None
    if plain is None or of is None or of.wide or (normed and most > 1) or (paired and (of.across or rows % 2)):
        return None
    shared = plain.shared + (plain.threads // 32 + of.padded // 2 if normed else 0)
    if shared * 4 > _SHARED:
        return None
    results = 2 * -(-plain.rows // 2 * most // plain.threads) if paired else plain.results
    arguments = f"{plain.arguments}, {str(normed).lower()}, {str(paired).lower()}"
    return Instance(arguments, plain.rows, plain.threads, results, shared, plain.ahead, "fused_rows")


def _blocks(rows: int | None, tiles: int) -> int:
    return 1 << 16 if rows is None else -(-rows // (16 * tiles))


def _warps(blocks: int, steps: int, most: int, normed: bool) -> int:
    """Of a block: enough for the device's memory to be busy, and no more than there are steps."""
    warps, busy = 4, _NORMED_WARPS if normed else _WARPS
    while warps < most and blocks * warps < MULTIPROCESSORS * busy and 2 * warps <= steps:
        warps *= 2
    return warps


def _ahead(each: int, tiles: int, normed: bool) -> int:
    """Steps whose loads are on their way, of `each` steps of a warp.

    Not all, or the compiler puts the loads off, where no norm's barrier is behind them.
    """
    if normed:
        return min(4 // tiles, each)
    return 2 if each == 4 else max(1, min(4 // tiles, each - 1))


def few_rows(function: tirx.PrimFunc, product: Any, most: int) -> tirx.PrimFunc | None:
    """`function`, a product with what follows, for up to `most` rows of x; None where no function of ours is its."""
    found = operands(function, product)
    chosen = found and instance(found.form, found.fixed_rows, found.columns, most)
    return function.with_body(_body(chosen, found)) if found and chosen else None


@dataclass(frozen=True)
class Operands:
    """Of a product: the format and sizes of its matrix, x, words and scales, and what becomes of sums."""

    form: str
    n: Any
    rows: Any
    columns: int
    buffers: tuple[Any, ...]
    epilogue: Epilogue

    @property
    def fixed_rows(self) -> int | None:
        return int(self.rows) if isinstance(self.rows, tirx.IntImm) else None

    @property
    def pointers(self) -> list[Any]:
        return [buffer.data for buffer in self.buffers]


def operands(function: tirx.PrimFunc, product: Any) -> Operands | None:
    """None where `function`, a product with what follows, is none that functions of ours can be put into."""
    form = product.annotations.get(FORMAT)
    if form is None:
        return None
    n, height, width = (var.dom.extent for var in product.iter_vars)
    sch = s_tir.Schedule(function)
    block = sch.get_sblock(str(product.name_hint))
    x, w = (region.source for region in product.reads)
    packed = [region.source for read in _writers(sch, block, w) for region in read.reads]
    words, scales = (packed[0], packed[1]) if len(packed) == 2 else (w, x)
    last = sch.get(inline_consumers(sch, block) or block)
    if len(last.iter_vars) != 2 and last.init is None:
        return None
    epilogue = Epilogue(last, product.writes[0].source)
    return Operands(str(form), n, height, int(width), (x, words, scales), epilogue)


def _writers(sch: Any, block: Any, buffer: Any) -> list[Any]:
    producers = [sch.get(producer) for producer in sch.get_producers(block)]
    return [producer for producer in producers if producer.writes[0].source.same_as(buffer)]


class Epilogue:
    """What is stored for a sum: `last` is the block that does so, `sums` the buffer that it takes it from."""

    def __init__(self, last: Any, sums: Any) -> None:
        self.row, self.column = (var.var for var in last.iter_vars[:2])
        self.store, self.sums = last.body, sums

    def at(self, row: Any, column: Any, total: Any) -> Any:
        def load(node: Any) -> Any:
            return total if node.source.same_as(self.sums) else node

        def place(var: Any) -> Any:
            return row if var.same_as(self.row) else column if var.same_as(self.column) else var

        if self.store.buffer.same_as(self.sums):  # the product itself is the result
            return tirx.BufferStore(self.sums, total, [row, column])
        return tvm_ffi.structural_map(self.store, [(ir.TensorLoad, load), (ir.Var, place)])


def _body(chosen: Instance, product: Operands) -> Any:
    """Blocks of threads of which each takes `chosen.rows` rows of the matrix."""
    block, thread, number = (tirx.Var(name, "int32") for name in ("bx", "tx", "i"))
    results = tirx.decl_buffer((chosen.results,), "float32", "results", scope="local")
    shared = tirx.decl_buffer((chosen.shared,), "float32", "partial", scope="shared")
    n, rows = product.n, product.rows
    pointers = [results.data, shared.data, *product.pointers]
    call = tirx.Evaluate(tirx.call_extern("void", chosen.name, *pointers, n, rows, block))
    at = number * chosen.threads + thread
    row, column = at // chosen.rows, block * chosen.rows + at % chosen.rows
    inside = tirx.all(row < n, column < rows)
    store = tirx.IfThenElse(inside, product.epilogue.at(row, column, tirx.BufferLoad(results, [number])), None)
    stores = tirx.For(number, 0, chosen.results, tirx.ForKind.UNROLLED, store)
    blocks = {"blockIdx.x": (block, (rows + chosen.rows - 1) // chosen.rows)}
    return launched(tirx.SeqStmt([call, stores]), [results, shared], (thread, chosen.threads), blocks)


def launched(body: Any, buffers: list[Any], threads: tuple[Any, int], blocks: Mapping[str, tuple[Any, Any]]) -> Any:
    """A kernel whose threads do `body`, with buffers of their own and of their block: variables and their extents."""
    inner = s_tir.SBlock([], [], [], "rows", body, alloc_buffers=buffers)
    body = s_tir.SBlockRealize([], True, inner)
    for tag, (var, extent) in {"threadIdx.x": threads, **blocks}.items():
        axis = tirx.IterVar(None, var, tirx.IterVar.ThreadIndex, tag)
        body = tirx.For(var, 0, extent, tirx.ForKind.THREAD_BINDING, body, thread_binding=axis)
    return s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", body))
