"""A lowered module in the one spelling that its content has, so that the same inputs give the same bytes.

Two things would differ from run to run or from place to place: source positions, which hold paths of the machine, and
the order in which `VMShapeLower` stores computed sizes, which follows the addresses of objects in memory.
"""

from __future__ import annotations

import json
from typing import Any

from tvm import IRModule, ir, tirx


def order_shape_functions(module: IRModule) -> IRModule:
    """Sort the stores of each `shape_func` by the slot that they fill.

    Every store of one such function reads only slots that were filled before the function is called.
    """
    for name, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and name.name_hint.startswith("shape_func"):
            body = function.body
            if isinstance(body, tirx.SeqStmt) and all(isinstance(s, tirx.BufferStore) for s in body.seq):
                ordered = sorted(body.seq, key=lambda store: int(store.indices[0]))
                module[name] = function.with_body(tirx.SeqStmt(ordered))
    return module


def to_text(module: IRModule) -> str:
    """The module as JSON without source positions, which `ir.load_json` reads."""
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
    text: str = ir.save_json(ir.load_json(json.dumps(document)))
    return text
