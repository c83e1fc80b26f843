"""What the next product reads first is on its way while a kernel ends and another begins, on CUDA devices.

A product of few rows is given the matrix of the product that the same function calls next, as one more argument, and asks
for its first bytes (kernels/prefetch.cuh). Where there is none, or of another dtype, it is given its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tvm_ffi
from tvm import DataType, IRModule, ir, relax, tirx

from mlcbuild.compiler.gpu.inlining import added, called, given_to

_KILOBYTES = 1536  # as many as an A100's memory has on their way at once
_WORDS = {"mlcbuild::few_rows": 3, "mlcbuild::fused_rows": 4}  # which pointer of a function is the matrix
_LINE = 128  # bytes


def prefetch(module: IRModule) -> IRModule:
    """The module, with scheduled products, whose products fetch."""
    functions = dict(module.functions_items())
    places = {gv: place for gv, f in functions.items() if isinstance(f, tirx.PrimFunc) and (place := _matrix(f))}
    made: dict[Any, Any] = {}

    def fetching(gv: Any, count: int) -> Any:
        if gv not in made:
            made[gv] = added(module, f"{gv.name_hint}_ahead", _fetching(functions[gv], places[gv], count))
        return made[gv]

    for gv, function in functions.items():
        if isinstance(function, relax.Function):
            blocks = _with_next(function, places, fetching)
            body, ret = relax.SeqExpr(blocks, function.body.body), function.ret_ty
            module[gv] = relax.Function(function.params, body, ret, function.is_pure, function.attrs)
    return module


def _matrix(function: tirx.PrimFunc) -> int:
    """Which parameter the functions of ours read as the matrix; 0 where there are none."""
    found: list[Any] = []

    def take(call: Any) -> Any:
        place = _WORDS.get(_called(call))
        if place is not None:
            found.append(call.args[1 + place])
        return call

    tvm_ffi.structural_map(function.body, [(ir.Call, take)])
    same = [i for i, p in enumerate(function.params) if found and tvm_ffi.structural_equal(p.data, found[0])]
    return same[0] if same else 0


def _called(call: Any) -> str:
    """The function of ours that a call is of, without what it is made for; nothing for other calls."""
    extern = call.op == ir.Op.get("tirx.call_extern")
    return str(call.args[0].value).split("<")[0] if extern else ""


def _with_next(function: relax.Function, places: Mapping[Any, int], fetching: Callable[[Any, int], Any]) -> list[Any]:
    """The function's blocks, in which products are `fetching` ones, with the next one's matrix after their inputs."""
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    values = {binding.var: binding.value for binding in bindings if isinstance(binding, relax.VarBinding)}
    known = set(function.params)
    products = [b for b in bindings if given_to(b) and b.value.args[0] in places]
    matrices = {b.var: given_to(b)[places[b.value.args[0]]] for b in products}
    following = dict(zip([b.var for b in products], [matrices[b.var] for b in products[1:]], strict=False))

    def changed(binding: Any) -> list[Any]:
        own = matrices.get(binding.var)
        if own is None:
            known.add(binding.var)
            return [binding]
        wanted, before = following.get(binding.var, own), list[Any]()
        if (wanted.ty.dtype, wanted.ty.ndim) != (own.ty.dtype, own.ty.ndim):
            wanted = own
        taken = values.get(wanted)
        if wanted not in known and isinstance(taken, relax.TupleGetItem) and taken.tuple_value in known:
            before = [relax.VarBinding(relax.DataflowVar("next", wanted.ty), taken)]
            wanted = before[0].var
        given = given_to(binding)
        last = wanted if before or wanted in known else own
        known.add(binding.var)
        call = called(fetching(binding.value.args[0], len(given)), [*given, last], binding.var.ty)
        return [*before, relax.VarBinding(binding.var, call)]

    blocks = []
    for block in function.body.blocks:
        new = [each for binding in block.bindings for each in changed(binding)]
        blocks.append(type(block)(new))
    return blocks


def _fetching(function: tirx.PrimFunc, place: int, count: int) -> tirx.PrimFunc:
    """`function` with another matrix after its `count` inputs, which kernels of few rows ask for."""
    dtype = function.params[place].dtype
    sizes = [tirx.Var(name, "int32") for name in ("next_rows", "next_columns")]
    matrix = tirx.decl_buffer(sizes, dtype, "next")
    each = _LINE // DataType(dtype).itemsize
    fetch = tirx.call_extern("void", f"mlcbuild::prefetch_next<{_KILOBYTES}>", matrix.data, sizes[0] * sizes[1] // each)

    def with_fetch(node: Any) -> Any:
        first, *others = node.seq
        ours = isinstance(first, tirx.Evaluate) and isinstance(first.value, ir.Call) and _called(first.value) in _WORDS
        return tirx.SeqStmt([first, tirx.Evaluate(fetch), *others]) if ours else node

    body = tvm_ffi.structural_map(function.body, [(tirx.SeqStmt, with_fetch)])
    params = [*function.params[:count], matrix, *function.params[count:]]
    return tirx.PrimFunc(params, body, function.ret_type, function.attrs)
