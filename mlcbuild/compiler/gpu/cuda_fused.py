"""Fewer launches at decode on CUDA devices: a norm, the product behind it and the gate behind that as one function.

Up to eight rows that is one kernel, of kernels/fused_rows.cuh. More rows launch them one by one; what lies between them is
a result of the function that nobody reads, so that the graph plans its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import IRModule, ir, relax, s_tir, tirx

from mlcbuild.compiler.gpu.cuda_rows import fused, launched, operands
from mlcbuild.compiler.gpu.inlining import blocks_of
from mlcbuild.compiler.gpu.products import PRODUCT
from mlcbuild.compiler.gpu.rows import GATE, NORM

COUNTS = (1, 8)  # rows of x that there are such kernels for: up to so many
Schedule = Callable[[tirx.PrimFunc, int], tirx.PrimFunc]


@dataclass(frozen=True)
class _Chain:
    """Bindings that follow each other: of a norm, of a product, and of a gate or not."""

    bindings: tuple[Any, ...]
    functions: tuple[tirx.PrimFunc, ...]


def fuse(module: IRModule, schedule: Schedule) -> IRModule:
    """Call one function, scheduled, for each such chain; `schedule` is for a function and more rows than a number."""
    made: dict[tuple[Any, ...], Any] = {}
    functions = dict(module.functions_items())
    for gv, function in functions.items():
        if isinstance(function, relax.Function):
            blocks = [_with_chains(block, functions, module, made, schedule) for block in function.body.blocks]
            body = relax.SeqExpr(blocks, function.body.body)
            params, ret = function.params, function.ret_ty
            module[gv] = relax.Function(params, body, ret, function.is_pure, function.attrs)
    return module


def _with_chains(block: Any, functions: Any, module: IRModule, made: dict[Any, Any], schedule: Schedule) -> Any:
    if not isinstance(block, relax.DataflowBlock):
        return block
    instead: dict[Any, list[Any]] = {}
    for chain in _chains(block, functions):
        called = tuple(binding.value.args[0] for binding in chain.bindings)
        if called not in made:
            function = _function(chain.functions, schedule)
            made[called] = None if function is None else _add(module, called, function)
        if made[called] is None:
            continue
        *first, last = chain.bindings
        instead |= dict.fromkeys((binding.var for binding in first), [])
        results = [binding.var.ty for binding in chain.bindings]
        given = [list(binding.value.args[1].fields) for binding in chain.bindings]
        call = relax.call_tir(made[called], [*given[0], *given[1][1:]], results)
        all_results = relax.DataflowVar("fused", relax.TupleType(results))
        taken = relax.TupleGetItem(all_results, len(results) - 1)
        instead[last.var] = [relax.VarBinding(all_results, call), relax.VarBinding(last.var, taken)]
    bindings = [new for binding in block.bindings for new in instead.get(binding.var, [binding])]
    return relax.DataflowBlock(bindings)


def _add(module: IRModule, called: Sequence[ir.GlobalVar], function: tirx.PrimFunc) -> ir.GlobalVar:
    gv = ir.GlobalVar("_".join(each.name_hint for each in called))
    relax.expr._update_type(gv, relax.FuncType.opaque_func(ret=relax.AnyType()))
    module[gv] = function
    return gv


def _chains(block: Any, functions: Any) -> list[_Chain]:
    uses = relax.analysis.udchain(block)
    found = {binding.var: binding for binding in block.bindings}

    def next_of(binding: Any) -> Any:
        """The one binding whose call has the result as its first argument, and uses it nowhere else."""
        if not isinstance(binding.var, relax.DataflowVar) or len(uses[binding.var]) != 1:
            return None
        (user,) = uses[binding.var]
        given = _given(found.get(user))
        return found[user] if [each.same_as(binding.var) for each in given] == [True] + [False] * len(given[1:]) else None

    chains = []
    for binding in block.bindings:
        norm = _called(binding, functions)
        product = next_of(binding) if norm is not None and _attribute(norm, NORM) is not None else None
        multiply = _called(product, functions)
        if multiply is None or norm is None:
            continue
        gate = next_of(product)
        gated = _called(gate, functions)
        if gated is not None and _attribute(gated, GATE) is not None:
            chains.append(_Chain((binding, product, gate), (norm, multiply, gated)))
        else:
            chains.append(_Chain((binding, product), (norm, multiply)))
    return chains


def _given(binding: Any) -> list[Any]:
    """What a function of ours is called with; nothing where something else is bound."""
    value = getattr(binding, "value", None)
    call = isinstance(value, relax.Call) and value.op == ir.Op.get("relax.call_tir") and len(value.args) == 2
    return list(value.args[1].fields) if call and isinstance(value.args[1], relax.Tuple) else []


def _called(binding: Any, functions: Any) -> tirx.PrimFunc | None:
    return functions[binding.value.args[0]] if _given(binding) else None


def _attribute(function: tirx.PrimFunc, name: str) -> Any:
    return function.attrs.get(name) if function.attrs is not None else None


def _function(functions: tuple[tirx.PrimFunc, ...], schedule: Schedule) -> tirx.PrimFunc | None:
    """All of them as one function, with a result for each; None where there are no kernels."""
    norm = functions[0]
    n, joined = norm.params[0].shape[0], [norm]
    for each in functions[1:]:
        renamed = _replaced(each, {each.params[0].shape[0]: n})
        joined.append(_onto(renamed, [joined[-1].params[-1], *renamed.params[1:]]))
    kernels = [(most, _kernel(most, *joined)) for most in reversed(COUNTS)]
    if any(kernel is None for _, kernel in kernels):
        return None
    many = []
    for each, of in zip(functions, joined, strict=True):
        scheduled = schedule(each, COUNTS[-1])
        many.append(_onto(_replaced(scheduled, {scheduled.params[0].shape[0]: n}), of.params).body)
    body: Any = tirx.SeqStmt(many)
    for most, kernel in kernels:
        body = tirx.IfThenElse(tirx.op.tvm_thread_invariant(n <= most), kernel, body)
    body = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", body))
    params = [*norm.params[:-1], *joined[1].params[1:-1], *(each.params[-1] for each in joined)]
    attributes = {"tirx.is_scheduled": True, "tirx.HoistIfThenElseExprWithBlock": 1, "tirx.noalias": True}
    return tirx.PrimFunc(params, body).with_attrs(attributes)


def _onto(function: tirx.PrimFunc, params: Sequence[Any]) -> tirx.PrimFunc:
    """`function` with other parameters of the same types."""
    body = _replaced(function.body, dict(zip(function.params, params, strict=True)))
    return tirx.PrimFunc(params, body, function.ret_type, function.attrs)


def _replaced(node: Any, by: Mapping[Any, Any]) -> Any:
    return tvm_ffi.structural_map(node, [(ir.Var, lambda var: by.get(var, var))])


def _kernel(
    most: int, norm: tirx.PrimFunc, product: tirx.PrimFunc, gate: tirx.PrimFunc | None = None
) -> tirx.Stmt | None:
    """What up to `most` rows of x launch; None where no function of ours reads the product's matrix."""
    found = operands(product, blocks_of(product)[PRODUCT])
    if found is None or found.fixed_rows is None:
        return None
    x, weight = norm.params[:2]
    dtype = found.buffers[0].dtype
    chosen = fused(found.form, found.fixed_rows, found.columns, most, gate is not None)
    if chosen is None or {x.dtype, weight.dtype} != {dtype}:
        return None
    block, thread, number = (tirx.Var(name, "int32") for name in ("bx", "tx", "i"))
    results = tirx.decl_buffer((chosen.results,), "float32", "results", scope="local")
    shared = tirx.decl_buffer((chosen.shared,), "float32", "partial", scope="shared")
    eps = tirx.const(float(norm.attrs[NORM]), "float32")
    pointers = [results.data, shared.data, x.data, weight.data, *found.pointers[1:]]
    call = tirx.Evaluate(tirx.call_extern("void", chosen.name, *pointers, eps, found.n, found.rows, block))
    each = 1 if gate is None else 2  # rows of the matrix to a result
    height = chosen.rows // each
    at = number * chosen.threads + thread
    row, column = at // height, block * height + at % height
    sums = [tirx.BufferLoad(results, [number * each + i]) for i in range(each)]
    if gate is None:
        store = found.epilogue.at(row, column, sums[0])
    else:
        parts = (found.epilogue.at(row, column + i * (found.rows // 2), sums[i]).value for i in range(each))
        store = _gated(gate, row, column, *parts)
    inside = tirx.all(row < found.n, column < found.rows // each)
    stores = tirx.For(number, 0, chosen.results // each, tirx.ForKind.UNROLLED, tirx.IfThenElse(inside, store, None))
    blocks = {"blockIdx.x": (block, -(-found.fixed_rows // chosen.rows))}
    return launched(tirx.SeqStmt([call, stores]), [results, shared], (thread, chosen.threads), blocks)


def _gated(function: tirx.PrimFunc, row: Any, column: Any, gate: Any, up: Any) -> Any:
    """The store of a gate's function, with values in place of what it loads from [gate | up]."""
    (block,) = blocks_of(function).values()
    i, j = (var.var for var in block.iter_vars)

    def load(node: Any) -> Any:
        return gate if node.indices[1].same_as(j) else up

    store = tvm_ffi.structural_map(block.body, [(ir.TensorLoad, load)])
    return _replaced(store, {i: row, j: column})
