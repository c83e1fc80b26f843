"""Symbols of a static library under a prefix of its own, so that an app can hold several."""

from __future__ import annotations

from typing import Any

import tvm_ffi
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
    rename = [(ir.GlobalVar, lambda variable: renamed.get(variable.name_hint, variable))]
    for gv, function in module.functions_items():
        if isinstance(function, relax.Function):
            functions[gv] = tvm_ffi.structural_map(function, rename)
    result = IRModule(functions)
    for key, value in (module.attrs or {}).items():
        result = result.with_attr(key, value)
    return result.with_attr("system_lib_prefix", prefix)
