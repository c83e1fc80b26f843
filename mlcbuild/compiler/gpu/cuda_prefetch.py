"""What the next product reads first is on its way while a kernel ends and another begins, on CUDA devices.

A product of few rows is given the matrix of the product that the same function calls next, as one more argument, and
asks for its first bytes (kernels/prefetch.cuh). Where none follows, it stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import tvm_ffi
from tvm import DataType, IRModule, ir, relax, tirx

from mlcbuild.compiler.gpu.calls import added, bindings_of, called, given_to, rebound
from mlcbuild.compiler.gpu.rows import int64

KILOBYTES = 2048  # of a part: about what the memory of an A100 or H100 has on its way at once
PARTS = 3  # one that the product before asks for, and two that the KV cache's kernels do, where they are between
_MATRIX = {"mlcbuild::few_rows": 4, "mlcbuild::fused_rows": 5}  # the argument of a call, after the function's name


def prefetch(module: IRModule) -> IRModule:
    """The module, whose products are scheduled, with fetching ones in place of those that others follow."""
    functions = dict(module.functions_items())
    places = {gv: place for gv, f in functions.items() if isinstance(f, tirx.PrimFunc) and (place := _matrix(f))}
    made: dict[Any, Any] = {}  # by the function, and the dtype and dimensions of the next matrix
    for gv, function in functions.items():
        if not isinstance(function, relax.Function):
            continue
        instead = {}
        for binding, before, wanted in _followed(function, places):
            own, given = _called(binding), given_to(binding)
            key = own, str(wanted.ty.dtype), int(wanted.ty.ndim)
            if key not in made:
                fetching = _fetching(functions[own], len(given), *key[1:])
                made[key] = added(module, f"{own.name_hint}_ahead_{len(made)}", fetching)
            call = called(made[key], [*given, wanted], binding.var.ty)
            instead[binding.var] = [*before, relax.VarBinding(binding.var, call)]
        module[gv] = rebound(function, instead)
    return module


def _followed(function: relax.Function, places: Mapping[Any, int]) -> list[tuple[Any, list[Any], Any]]:
    """Calls of products that others follow, what to bind before, and the next one's matrix; none that is not known."""
    bindings = bindings_of(function)
    values = {each.var: each.value for each in bindings if isinstance(each, relax.VarBinding)}
    order = [each for each in bindings if _called(each) in places]
    matrices = [given_to(each)[places[_called(each)]] for each in order[1:]]
    following = dict(zip([each.var for each in order], matrices, strict=False))
    known, found = set(function.params), []
    for binding in bindings:
        known.add(binding.var)
        wanted: Any = following.get(binding.var)
        taken, before = values.get(wanted), list[Any]()
        if wanted not in known and isinstance(taken, relax.TupleGetItem) and taken.tuple_value in known:
            wanted = relax.DataflowVar("next", wanted.ty)
            known.add(wanted)
            before = [relax.VarBinding(wanted, taken)]
        if wanted in known:
            found.append((binding, before, wanted))
    return found


def _called(binding: Any) -> Any:
    return binding.value.args[0] if given_to(binding) else None


def _matrix(function: tirx.PrimFunc) -> int:
    """Which parameter the functions of ours read as the matrix; 0 where they are not called."""
    found: list[Any] = []

    def take(call: Any) -> Any:
        found.extend([call.args[_MATRIX[_name(call)]]] if _name(call) in _MATRIX else [])
        return call

    tvm_ffi.structural_map(function.body, [(ir.Call, take)])
    if not found:
        return 0
    place = next((i for i, p in enumerate(function.params) if tvm_ffi.structural_equal(p.data, found[0])), 0)
    assert place, "x, or what is the kernel's own, is where _MATRIX says that the matrix is"
    return place


def _name(call: Any) -> str:
    """The function of ours that a call is of, without what it is made for; nothing for other calls."""
    return str(call.args[0].value).split("<")[0] if call.op == ir.Op.get("tirx.call_extern") else ""


def _fetching(function: tirx.PrimFunc, count: int, dtype: str, dimensions: int) -> tirx.PrimFunc:
    """`function` with another matrix after its `count` inputs, which kernels of few rows ask for."""
    sizes = [tirx.Var(f"next_{i}", "int32") for i in range(dimensions)]
    matrix = tirx.decl_buffer(sizes, dtype, "next")
    arguments = matrix.data, bytes_of(sizes, dtype), KILOBYTES * 1024
    fetch = tirx.Evaluate(tirx.call_extern("void", "mlcbuild::prefetch_next", *arguments))

    def with_fetch(node: Any) -> Any:
        first, *others = node.seq
        ours = isinstance(first, tirx.Evaluate) and isinstance(first.value, ir.Call) and _name(first.value) in _MATRIX
        return tirx.SeqStmt([first, fetch, *others]) if ours else node

    body = tvm_ffi.structural_map(function.body, [(tirx.SeqStmt, with_fetch)])
    params = [*function.params[:count], matrix, *function.params[count:]]
    return tirx.PrimFunc(params, body, function.ret_type, function.attrs)


def bytes_of(sizes: Sequence[Any], dtype: str) -> Any:
    """Those of a matrix that are asked for, int32. All of one may be more than int32 has: 256,000 rows of 12,288."""
    every = math.prod((size.astype("int64") for size in sizes), start=int64(DataType(dtype).itemsize))
    return tirx.min(every, int64(PARTS * KILOBYTES * 1024)).astype("int32")
