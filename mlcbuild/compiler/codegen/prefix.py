"""Symbols of a static library under a prefix of its own, so that an app can hold several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import IRModule, ir, relax, tirx


def with_prefix(module: IRModule, prefix: str) -> IRModule:
    """`module` with `prefix` before the name of each function in machine code; the VM's functions keep theirs.

    TVM's AttachGlobalSymbol does this too, but fails on kernels with simdgroup instructions.
    """
    machine = {gv.name_hint: f for gv, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}
    renamed = {name: ir.GlobalVar(prefix + name) for name in machine}
    for variable in renamed.values():
        relax.expr._update_type(variable, relax.FuncType.opaque_func(ret=relax.TupleType([])))
    functions: dict[Any, Any] = {
        renamed[name]: function.with_attr("global_symbol", prefix + name) for name, function in machine.items()
    }
    rename = _Rename(renamed)
    for gv, function in module.functions_items():
        if isinstance(function, relax.Function):
            functions[gv] = rename.visit_expr(function)
    result = IRModule(functions)
    for key, value in (module.attrs or {}).items():
        result = result.with_attr(key, value)
    return result.with_attr("system_lib_prefix", prefix)


@relax.expr_functor.mutator
class _Rename(relax.PyExprMutator):  # type: ignore[misc]
    def __init__(self, names: Mapping[str, ir.GlobalVar]) -> None:
        super().__init__()
        self.names = names

    def visit_global_var_(self, variable: ir.GlobalVar) -> ir.GlobalVar:
        return self.names.get(variable.name_hint, variable)
