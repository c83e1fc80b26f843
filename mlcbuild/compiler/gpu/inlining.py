"""The blocks of a function, and inlining around the one that a schedule is about."""

from __future__ import annotations

from typing import Any

from tvm import IRModule, ir, relax, s_tir, tirx


def inline_producers(sch: Any, block: Any) -> None:
    """Everything that `block` reads from, however indirectly, becomes part of it."""
    while producers := sch.get_producers(block):
        for producer in producers:
            inline_producers(sch, producer)
            sch.compute_inline(producer)


def inline_consumers(sch: Any, block: Any) -> Any:
    """One block that does everything that follows `block`, or None where nothing does."""
    consumers = sch.get_consumers(block)
    if not consumers:
        return None
    last = block
    while nexts := sch.get_consumers(last):
        (last,) = nexts
    while True:
        (first,) = sch.get_consumers(block)
        if sch.get(first).same_as(sch.get(last)):
            break
        sch.compute_inline(first)
    for producer in sch.get_producers(last):
        if not sch.get(producer).same_as(sch.get(block)):
            inline_producers(sch, producer)
            sch.compute_inline(producer)
    return last


def blocks_of(function: tirx.PrimFunc) -> dict[str, Any]:
    """The function's blocks by name."""
    sch = s_tir.Schedule(function)
    blocks = [sch.get(block) for block in sch.get_child_blocks(sch.get_sblock("root"))]
    return {block.name_hint: block for block in blocks}


def given_to(binding: Any) -> list[Any]:
    """What a binding calls a TIR function with; nothing where something else is bound."""
    value = getattr(binding, "value", None)
    call = isinstance(value, relax.Call) and value.op == ir.Op.get("relax.call_tir") and len(value.args) == 2
    return list(value.args[1].fields) if call and isinstance(value.args[1], relax.Tuple) else []


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
