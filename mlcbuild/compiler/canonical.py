"""A lowered module in the one spelling that its content has, so that the same inputs give the same bytes.

Two things would differ from run to run or from place to place: source positions, which hold paths of the machine, and
the order in which `VMShapeLower` stores computed sizes, which follows the addresses of objects in memory. It also finds
two functions that differ in that order only to be two, so that even their number differed.
"""

from __future__ import annotations

import json
from typing import Any

import tvm_ffi
from tvm import IRModule, ir, relax, tirx
from tvm_ffi import serialization

_SHAPE_FUNCTION = "shape_func"


def order_shape_functions(module: IRModule) -> IRModule:
    """Sort the stores of each `shape_func` by the slot that they fill; those that are equal then become one.

    Every store of one such function reads only slots that were filled before the function is called.
    """
    found = {}
    for name, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and name.name_hint.startswith(_SHAPE_FUNCTION):
            body = function.body
            if isinstance(body, tirx.SeqStmt) and all(isinstance(s, tirx.BufferStore) for s in body.seq):
                ordered = sorted(body.seq, key=lambda store: int(store.indices[0]))
                function = function.with_body(tirx.SeqStmt(ordered))
                module[name] = function
            found[name.name_hint] = function
    return _merged(module, found)


def _merged(module: IRModule, found: dict[str, tirx.PrimFunc]) -> IRModule:
    """The module with one function instead of equal ones, numbered in the order in which they were.

    Every one gets a variable and a type of its own, merged or not: which objects are shared shows in the text.
    """
    kept: list[tirx.PrimFunc] = []
    new: list[ir.GlobalVar] = []
    numbers, results = {}, []
    for name in sorted(found, key=lambda name: int(name.removeprefix(_SHAPE_FUNCTION) or 0)):
        function = found[name].without_attr("global_symbol")
        old = module.get_global_var(name).ty
        number = next((i for i, one in enumerate(kept) if tvm_ffi.structural_equal(one, function)), len(kept))
        if number == len(kept):
            kept.append(function)
            new.append(ir.GlobalVar(_SHAPE_FUNCTION + str(number or "")))
            relax.expr._update_type(new[number], serialization.from_json_graph_str(ir.save_json(old)))
        numbers[name] = number
        results.append((old.ret, new[number].ty.ret))
    rename = [
        (ir.GlobalVar, lambda gv: new[numbers[gv.name_hint]] if gv.name_hint in numbers else gv),
        (ir.TupleType, lambda of: next((after for before, after in results if of.same_as(before)), of)),
    ]
    functions = {
        gv: tvm_ffi.structural_map(function, rename) if isinstance(function, relax.Function) else function
        for gv, function in module.functions_items()
        if gv.name_hint not in found
    }
    for variable, function in zip(new, kept, strict=True):
        functions[variable] = function.with_attr("global_symbol", variable.name_hint)
    return IRModule(functions, attrs=module.attrs, global_infos=module.global_infos)


def to_text(module: IRModule) -> str:
    """The module as JSON without source positions, which `from_text` reads."""
    document = json.loads(ir.save_json(module))
    nodes: list[dict[str, Any]] = document["nodes"]
    nothing = next((i for i, node in enumerate(nodes) if node["type"] == "None"), None)
    if nothing is None:
        nothing = len(nodes)
        nodes.append({"type": "None"})
    for node in nodes:
        fields = node.get("data")
        if isinstance(fields, dict) and "span" in fields:
            fields["span"] = nothing
    # Loading and saving again leaves out the positions themselves, to which nothing refers any more.
    text: str = ir.save_json(from_text(json.dumps(document)))
    return text


def from_text(text: str) -> IRModule:
    """The module in JSON that this version of TVM has written.

    `ir.load_json` looks for what older versions wrote, in Python: three quarters of its time.
    """
    module: IRModule = serialization.from_json_graph_str(text)
    return module
