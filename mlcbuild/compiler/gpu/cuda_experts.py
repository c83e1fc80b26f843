"""Products of many rows with chosen experts on CUDA devices: kernels/many_rows.cuh for a tile, and TIR around it.

A block's rows of x are those of the plan's list (expert_plan.py), and its sums go to the choices that they are of.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from mlcbuild.compiler.gpu import cuda_many, cuda_rows
from mlcbuild.compiler.gpu.expert_plan import TILE
from mlcbuild.compiler.gpu.expert_tiles import Product

_THREADS, _HANDED = cuda_many.THREADS, cuda_many.HANDED


def bodies(p: Product) -> list[tuple[int | None, Any]]:
    """Kernels for up to so many choices, and for any number; none where no function of ours reads the matrices.

    Of an expert with c rows, half a block is not there, on the average: (c + 32) * 1.2 rows of small blocks cost as
    much as the c + 64 of large ones where c is TILE, if small ones take a fifth longer for a row.
    """
    form = cuda_rows.format_of(p.weights, p.dtype).get(cuda_rows.FORMAT)
    if form is None or str(p.x.dtype) != p.dtype:
        return []
    # Of a matrix with any number of rows: there are blocks enough where there are experts.
    small, large = (cuda_many.instance(form, None, p.columns, narrow) for narrow in (True, False))
    if small is None or large is None:
        return []
    every = (None, _body(large, p))
    return [every] if small == large else [(TILE * p.experts, _body(small, p)), every]


def _body(chosen: cuda_many.Instance, p: Product) -> Any:
    """Blocks of threads of which each takes `chosen.height` rows of an expert's matrix and `chosen.width` of a tile."""
    (block, tile), blocks = p.blocks(chosen.width, chosen.height)
    thread = tirx.Var("tx", "int32")
    sums = tirx.decl_buffer((chosen.height * chosen.width // _THREADS,), "float32", "sums", scope="local")
    shared = tirx.decl_buffer((chosen.shared,), "float32", "stages", scope="shared")
    expert, first, end = p.tile(tile // (TILE // chosen.width))
    first = first + tile % (TILE // chosen.width) * chosen.width
    words, scales = (*p.parts.values(), p.x)[:2]
    pointers = [buffer.data for buffer in (sums, shared, p.x, words, scales, p.order)]
    name = f"mlcbuild::rows_of_expert<{chosen.arguments}, {p.of_x}>"
    call = tirx.Evaluate(tirx.call_extern("void", name, *pointers, first, end, expert, p.rows, block))
    steps = []
    for part, hand_over in enumerate(chosen.handed):
        number = tirx.Var("i", "int32")
        at = number * _THREADS + thread
        low, inner = at // chosen.height, at % chosen.height
        place, column = first + part * _HANDED + low, block * chosen.height + inner
        total = tirx.BufferLoad(shared, [low * (chosen.height + 4) + inner]).astype(p.result.dtype)
        store = tirx.BufferStore(p.result, total, [p.order[place], column])
        inside = tirx.IfThenElse(tirx.all(place < end, column < p.rows), store, None)
        steps.append(tirx.Evaluate(tirx.call_extern("void", hand_over, shared.data, sums.data)))
        steps.append(tirx.For(number, 0, _HANDED * chosen.height // _THREADS, tirx.ForKind.SERIAL, inside))
    some = tirx.IfThenElse(first < end, tirx.SeqStmt(steps), None)  # all threads of a block, or none
    return cuda_rows.launched(tirx.SeqStmt([call, some]), [sums, shared], (thread, _THREADS), blocks)
