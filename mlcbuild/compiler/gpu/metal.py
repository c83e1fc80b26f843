"""The schedule of a matrix product on Apple GPUs: 8 x 8 tiles in simdgroup registers, in float32.

A block of threads is four simdgroups; it makes a tile of 32 rows of x by 64 rows of the matrix. Both operands come
through shared memory, where the matrix arrives unpacked. Apple's GPUs multiply float32 tiles as fast as float16 ones,
and sums over thousands of columns need float32.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx

from mlcbuild.compiler.gpu.inlining import inline_consumers, inline_producers
from mlcbuild.compiler.gpu.products import PRODUCT

_TILE = 8
_ROWS, _COLUMNS, _DEPTH = 32, 64, 32  # of x, of the matrix, and of their common axis
_GROUPS, _LANES, _VECTOR = 4, 32, 4


def many_rows(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """`function`, whose product's operands are float32, for any number of rows of x."""
    names = _intrinsics()
    sch = s_tir.Schedule(function)
    product = sch.get_sblock(PRODUCT)
    sch.pad_einsum(product, [_ROWS, _COLUMNS, _DEPTH])
    i, j, k = sch.get_loops(product)
    io, it, ii = sch.split(i, [None, _ROWS // _TILE, _TILE])
    jo, jg, jt, ji = sch.split(j, [None, _GROUPS, _COLUMNS // _GROUPS // _TILE, _TILE])
    ko, kt, ki = sch.split(k, [None, _DEPTH // _TILE, _TILE])
    sch.reorder(io, jo, jg, ko, kt, it, jt, ii, ji, ki)
    sch.bind(io, "blockIdx.y")
    sch.bind(jo, "blockIdx.x")
    sch.bind(jg, "threadIdx.y")

    for index in (0, 1):
        shared = sch.cache_read(product, index, "shared")
        sch.compute_at(shared, ko, preserve_unit_loops=True)
        inline_producers(sch, shared)
        _share_out(sch, sch.fuse(*sch.get_loops(shared)[-2:]))
    x, w = (sch.cache_read(product, index, "metal.simdgroup") for index in (0, 1))
    sch.compute_at(x, kt)
    sch.compute_at(w, kt)
    # A tile of the matrix is [columns, depth] in shared memory, and the transpose of that in registers.
    sch.transform_layout(w, ("write", 0), lambda row, column: (column, row))

    registers = sch.cache_write(product, 0, "metal.simdgroup")
    result = sch.cache_write(registers, 0, "shared")
    sch.reverse_compute_at(registers, jg, preserve_unit_loops=True)
    sch.reverse_compute_at(result, jo, preserve_unit_loops=True)

    init = sch.decompose_reduction(product, ko)
    for block, name in ((x, "load"), (w, "load_transposed"), (registers, "store"), (init, "fill")):
        row, column = sch.get_loops(block)[-2:]
        ro, ri = sch.split(row, [None, _TILE])
        co, ci = sch.split(column, [None, _TILE])
        sch.reorder(ro, co, ri, ci)
        sch.tensorize(ri, names[name])
    sch.tensorize(sch.get_loops(product)[-3], names["multiply"])

    sch.reverse_compute_inline(inline_consumers(sch, result))
    _share_out(sch, sch.fuse(*sch.get_loops(result)[-2:]))
    return sch.mod["main"]


def _share_out(sch: Any, loop: Any) -> None:
    """Neighbouring elements of a tile to neighbouring threads of all simdgroups."""
    _, group, lane, vector = sch.split(loop, [None, _GROUPS, _LANES, _VECTOR])
    sch.bind(group, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    sch.vectorize(vector)


def _intrinsics() -> dict[str, str]:
    """Names of the float32 tile operations; TVM registers those of float16 only."""
    from tvm.s_tir.tensor_intrin import metal as tiles

    made = {
        "fill": tiles.get_make_filled_simdgroup_matrix_intrin("float32"),
        "load": tiles.get_simdgroup_load_intrin("float32", "shared"),
        "load_transposed": tiles.get_simdgroup_load_intrin("float32", "shared", transpose_matrix=True),
        "store": tiles.get_simdgroup_store_intrin("float32", "shared"),
        "multiply": tiles.get_simdgroup_multiply_accumulate_intrin(_TILE, _TILE, _TILE, "float32"),
    }
    names = {name: f"mlcbuild_simdgroup_{name}_float32" for name in made}
    for name, (description, implementation) in made.items():
        s_tir.TensorIntrin.register(names[name], description, implementation, override=True)
    return names
