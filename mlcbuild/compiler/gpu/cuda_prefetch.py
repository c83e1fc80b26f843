"""What the next product reads first is on its way while a kernel ends and another begins, on CUDA devices.

A product of few rows is given the matrix of the product that the same function calls next, as one more argument, and
asks for its first bytes (kernels/prefetch.cuh). Where there is none, or of another dtype, it is given its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm_ffi
from tvm import DataType, IRModule, ir, relax, tirx

from mlcbuild.compiler.gpu.calls import added, called, given_to, rebound

KILOBYTES = 2048  # about what the memory of an A100 or H100 has on its way at once
_MATRIX = {"mlcbuild::few_rows": 4, "mlcbuild::fused_rows": 5}  # the argument of a call, after the function's name
_LINE = 128  # bytes


def prefetch(module: IRModule) -> IRModule:
    """The module, whose products are scheduled, with fetching ones in place of those that others follow."""
    functions = dict(module.functions_items())
    places = {gv: place for gv, f in functions.items() if isinstance(f, tirx.PrimFunc) and (place := _matrix(f))}
    graphs = {gv: f for gv, f in functions.items() if isinstance(f, relax.Function)}
    orders = {gv: [each for each in _bindings(f) if _called(each) in places] for gv, f in graphs.items()}
    made = {}
    for order in orders.values():
        for binding in order[:-1]:
            gv, count = _called(binding), len(given_to(binding))
            if gv not in made:
                made[gv] = added(module, f"{gv.name_hint}_ahead", _fetching(functions[gv], places[gv], count))
    for gv, order in orders.items():
        matrices = [given_to(binding)[places[_called(binding)]] for binding in order]
        pairs = zip(matrices, [*matrices[1:], *matrices[-1:]], strict=True)
        following = dict(zip([binding.var for binding in order], pairs, strict=True))
        module[gv] = _with_next(graphs[gv], following, made)
    return module


def _bindings(function: relax.Function) -> list[Any]:
    return [binding for block in function.body.blocks for binding in block.bindings]


def _called(binding: Any) -> Any:
    return binding.value.args[0] if given_to(binding) else None


def _matrix(function: tirx.PrimFunc) -> int:
    """Which parameter the functions of ours read as the matrix; 0 where they are not called."""
    found: list[Any] = []

    def take(call: Any) -> Any:
        found.extend([call.args[_MATRIX[_name(call)]]] if _name(call) in _MATRIX else [])
        return call

    tvm_ffi.structural_map(function.body, [(ir.Call, take)])
    same = [i for i, p in enumerate(function.params) if found and tvm_ffi.structural_equal(p.data, found[0])]
    return same[0] if same else 0


def _name(call: Any) -> str:
    """The function of ours that a call is of, without what it is made for; nothing for other calls."""
    return str(call.args[0].value).split("<")[0] if call.op == ir.Op.get("tirx.call_extern") else ""


def _with_next(function: relax.Function, following: Mapping[Any, Any], made: Mapping[Any, Any]) -> relax.Function:
    """`following`: of products' results, their own matrix and the next one's."""
    values = {each.var: each.value for each in _bindings(function) if isinstance(each, relax.VarBinding)}
    known, instead = set(function.params), dict[Any, list[Any]]()
    for binding in _bindings(function):
        known.add(binding.var)
        if _called(binding) not in made:
            continue
        (own, wanted), before = following[binding.var], list[Any]()
        taken = values.get(wanted)
        if wanted not in known and isinstance(taken, relax.TupleGetItem) and taken.tuple_value in known:
            wanted = relax.DataflowVar("next", wanted.ty)
            known.add(wanted)
            before = [relax.VarBinding(wanted, taken)]
        if wanted not in known or (wanted.ty.dtype, wanted.ty.ndim) != (own.ty.dtype, own.ty.ndim):
            wanted = own
        call = called(made[_called(binding)], [*given_to(binding), wanted], binding.var.ty)
        instead[binding.var] = [*before, relax.VarBinding(binding.var, call)]
    return rebound(function, instead)


def _fetching(function: tirx.PrimFunc, place: int, count: int) -> tirx.PrimFunc:
    """`function` with another matrix after its `count` inputs, which kernels of few rows ask for."""
    dtype = function.params[place].dtype
    sizes = [tirx.Var(name, "int32") for name in ("next_rows", "next_columns")]
    matrix = tirx.decl_buffer(sizes, dtype, "next")
    lines = sizes[0] * sizes[1] // (_LINE // DataType(dtype).itemsize)
    fetch = tirx.Evaluate(tirx.call_extern("void", f"mlcbuild::prefetch_next<{KILOBYTES}>", matrix.data, lines))

    def with_fetch(node: Any) -> Any:
        first, *others = node.seq
        ours = isinstance(first, tirx.Evaluate) and isinstance(first.value, ir.Call) and _name(first.value) in _MATRIX
        return tirx.SeqStmt([first, fetch, *others]) if ours else node

    body = tvm_ffi.structural_map(function.body, [(tirx.SeqStmt, with_fetch)])
    params = [*function.params[:count], matrix, *function.params[count:]]
    return tirx.PrimFunc(params, body, function.ret_type, function.attrs)
