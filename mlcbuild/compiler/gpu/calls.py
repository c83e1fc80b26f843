"""Calls of TIR functions in a model's graph, and functions that take the place of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import IRModule, ir, relax, tirx


def bindings_of(function: relax.Function) -> list[Any]:
    return [binding for block in function.body.blocks for binding in block.bindings]


def given_to(binding: Any) -> list[Any]:
    """What a binding calls a TIR function with; nothing where something else is bound."""
    value = getattr(binding, "value", None)
    if not isinstance(value, relax.Call) or value.op != ir.Op.get("relax.call_tir") or len(value.args) != 2:
        return []
    return list(value.args[1].fields) if isinstance(value.args[1], relax.Tuple) else []


def called(gv: ir.GlobalVar, given: list[Any], results: Any) -> Any:
    """A call of a TIR function; `results`: the type of its result, or a tuple of types."""
    several = isinstance(results, relax.TupleType)
    call = relax.call_tir(gv, given, list(results.fields) if several else results)
    relax.expr._update_type(call, results)
    return call


def added(module: IRModule, name: str, function: tirx.PrimFunc) -> ir.GlobalVar:
    """What a new function of a module is called by."""
    gv = ir.GlobalVar(name)
    relax.expr._update_type(gv, relax.FuncType.opaque_func(ret=relax.AnyType()))
    module[gv] = function
    return gv


def rebound(function: relax.Function, instead: Mapping[Any, list[Any]]) -> relax.Function:
    """`function` with other bindings in place of some, by what these bind."""
    blocks = []
    for block in function.body.blocks:
        blocks.append(type(block)([new for old in block.bindings for new in instead.get(old.var, [old])]))
    body = relax.SeqExpr(blocks, function.body.body)
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)
