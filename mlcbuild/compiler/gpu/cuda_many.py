"""Products of many rows of x on CUDA devices: the function of kernels/many_rows.cuh for a shape, and TIR around it.

What follows a product stays TIR, as for few rows (cuda_rows.py): sums come to it through shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from mlcbuild.compiler.gpu.cuda_rows import MULTIPROCESSORS, Matrix, Operands, launched, matrix, operands

THREADS, _WARPS = 128, 4  # of a block
_LANES = 4  # along a row
_UNITS = {4: 1, 3: 2, 8: 2, 16: 4}  # bits: words of a lane in a step (Codes<BITS>::UNIT)
_SHARED = 48 * 1024  # bytes of a block
_MOST_STAGES = 4
HANDED = 64  # rows of x whose sums are in shared memory at once
_NARROW, _MOST_NARROW = 64, 256  # rows of x of a small block; rows up to which they are better shared out so


@dataclass(frozen=True)
class Instance:
    """The function of one product: its template arguments, and what it asks of its caller."""

    arguments: str
    height: int  # rows of the matrix of a block
    width: int  # rows of x
    along: int  # sums of a result
    shared: int  # floats

    @property
    def name(self) -> str:
        return f"mlcbuild::many_rows<{self.arguments}>"

    @property
    def handed(self) -> list[str]:
        """Functions that give the sums of a part of the rows of x each, one part after the other."""
        warps, tiles = self.height // 32, self.width // 8
        parts = range(self.width // HANDED)
        return [f"mlcbuild::hand_over<{warps}, {tiles}, {HANDED}, {part}>" for part in parts]


def limit(rows: int | None) -> int:
    """Up to how many rows of x blocks are small: large ones would leave multiprocessors idle."""
    tall = 1 << 16 if rows is None else -(-rows // 128)
    return max(_NARROW, min(_MOST_NARROW, 128 * (-(-MULTIPROCESSORS // tall) - 1)))


def instance(form: str, rows: int | None, columns: int, narrow: bool) -> Instance | None:
    """The function for a matrix of cuda_rows.matrix, or None where there is none. narrow: for few rows of x."""
    of = matrix(form, rows, columns)
    if of is None or of.wide:
        return None
    tiles = 8 if narrow or of.bits == 3 else 16  # more numbers of 3 bits than shared memory holds
    warps = 2 if narrow and of.bits not in (3, 8) and limit(rows) > _NARROW else _WARPS  # for 8 bits, registers are few
    height, width, along = 32 * warps, 8 * tiles, _WARPS // warps
    stage = _stage(of, height, width, along)
    stages = min(_MOST_STAGES, _SHARED // stage)
    shared = max(stages * stage, along * HANDED * (height + 4) * 4)
    arguments = f"{of.type}, {columns}, {warps}, {tiles}, {stages}, {shared}"
    return Instance(arguments, height, width, along, shared // 4)


def _stage(of: Matrix, height: int, width: int, along: int) -> int:
    """Bytes of a step: ManyRows::STAGE."""
    unit = _UNITS[of.bits]
    words = _LANES * unit
    columns = words * of.per_word
    of_w = along * words * (height + (8 if unit == 1 else 4) if of.across else height) * 4
    scales = next((count for count in (1, 2, 4) if of.group % (columns // count) == 0), words) if of.group else 0
    return along * width * columns * 2 + of_w + scales * THREADS * 2


def many_rows(function: tirx.PrimFunc, product: Any) -> list[tuple[int | None, tirx.PrimFunc]]:
    """`function`, a product with what follows, for up to so many rows of x, and for any number; nothing where no
    function of ours is its."""
    found = operands(function, product)
    if found is None:
        return []
    rows = found.fixed_rows
    small, large = (instance(found.form, rows, found.columns, narrow) for narrow in (True, False))
    if small is None or large is None:
        return []
    every = (None, function.with_body(_body(large, found)))
    return [every] if small == large else [(limit(rows), function.with_body(_body(small, found))), every]


def _body(chosen: Instance, product: Operands) -> Any:
    """Blocks of threads of which each takes `chosen.height` rows of the matrix, and `chosen.width` of x."""
    of_x, block, thread = (tirx.Var(name, "int32") for name in ("bx", "by", "tx"))
    sums = tirx.decl_buffer((chosen.height * chosen.width * chosen.along // THREADS,), "float32", "sums", scope="local")
    shared = tirx.decl_buffer((chosen.shared,), "float32", "stages", scope="shared")
    n, rows = product.n, product.rows
    pointers = [sums.data, shared.data, *product.pointers]
    steps = [tirx.Evaluate(tirx.call_extern("void", chosen.name, *pointers, n, rows, of_x, block))]
    stride = chosen.height + 4
    for part, name in enumerate(chosen.handed):
        number = tirx.Var("i", "int32")
        at = number * THREADS + thread
        low, inner = at // chosen.height, at % chosen.height
        row, column = of_x * chosen.width + part * HANDED + low, block * chosen.height + inner
        total: Any = sum(
            tirx.BufferLoad(shared, [(along * HANDED + low) * stride + inner]) for along in range(chosen.along)
        )
        store = tirx.IfThenElse(tirx.all(row < n, column < rows), product.epilogue.at(row, column, total), None)
        steps.append(tirx.Evaluate(tirx.call_extern("void", name, shared.data, sums.data)))
        steps.append(tirx.For(number, 0, HANDED * chosen.height // THREADS, tirx.ForKind.SERIAL, store))
    blocks = {
        "blockIdx.x": (of_x, (n + chosen.width - 1) // chosen.width),
        "blockIdx.y": (block, (rows + chosen.height - 1) // chosen.height),
    }
    return launched(tirx.SeqStmt(steps), [sums, shared], (thread, THREADS), blocks)
