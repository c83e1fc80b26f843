"""What a kernel does for each step of its loop, counted in the TIR that code generators write down node by node.

Instructions are counted for each number of a vector. A multiplication that is added at once is one with it; making a
vector of numbers, and taking one out, is none; nor is what addresses are computed of.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tvm import ir, tirx

from mlcbuild.compiler.gpu.rewriting import nodes


@dataclass
class Marks:
    """loads: by buffer and bytes of a load; ahead: bytes of the matrix loaded before any of them is used."""

    instructions: int = 0
    loads: Counter[tuple[str, int]] = field(default_factory=Counter)
    ahead: int = 0
    barriers: int = 0
    looped: int = 0  # barriers inside of the loop

    def of(self, name: str) -> dict[int, int]:
        """Loads of a buffer by their bytes."""
        return {size: count for (buffer, size), count in self.loads.items() if buffer == name}


def marks(function: Any, matrix: str) -> Marks:
    """Of a device function's first loop that reads the buffer `matrix`."""
    loop = next(each for each in reversed(nodes(function.body, tirx.For)) if _reads(each, matrix))
    found = Marks()
    seen: set[tuple[str, str]] = set()
    for load in nodes(loop.body, ir.TensorLoad):
        key = (str(load.source.name), str(load.indices[0]))
        if str(load.source.ty.storage_scope) in ("", "global") and key not in seen:  # the same once more is none
            seen.add(key)
            found.loads[key[0], load.ty.dtype.itemsize] += 1
    found.ahead = _ahead(loop.body, matrix)
    for each in nodes(loop.body, tirx.BufferStore):
        found.instructions += _count(each.value)
    for each in nodes(loop.body, tirx.Bind):
        found.instructions += _count(each.value)
    found.barriers, found.looped = barriers(function.body), barriers(loop.body)
    return found


def _reads(node: Any, matrix: str) -> bool:
    return any(load.source.name == matrix for load in nodes(node, ir.TensorLoad))


def barriers(body: Any) -> int:
    """How many there are in the text of a kernel."""
    calls = [call for call in nodes(body, ir.Call) if getattr(call.op, "name", "") == "tirx.tvm_storage_sync"]
    return len(calls)


def _ahead(body: Any, matrix: str) -> int:
    """Names that are given to loads of the matrix, up to the first statement that is none."""
    total = 0
    for each in body.seq:
        if not (isinstance(each, tirx.Bind) and _reads(each, matrix)):
            break
        total += each.value.ty.dtype.itemsize
    return total


def _count(node: Any, fused: bool = False) -> int:
    kind = type(node).__name__
    lanes = getattr(getattr(node, "ty", None), "dtype", None)
    width = lanes.lanes if lanes is not None else 1
    if kind in ("TensorLoad", "Var", "IntImm", "FloatImm"):
        return 0
    if hasattr(node, "a") and hasattr(node, "b"):
        multiplied = kind in ("Add", "Sub")
        return _count(node.a, multiplied) + _count(node.b, multiplied) + (0 if kind == "Mul" and fused else width)
    if kind == "Cast":
        return _count(node.value) + width
    if kind == "Broadcast":
        return _count(node.value)
    if kind == "Shuffle":
        return sum(_count(each) for each in node.vectors)
    if kind == "Call":
        name = str(getattr(node.op, "name", "")).rpartition(".")[2]
        parts = sum(_count(each) for each in node.args)
        if name == "call_pure_extern" and str(node.args[0].value).startswith("("):
            return parts  # OpenCL's form of what is a Shuffle elsewhere
        return 0 if name == "reinterpret" else parts + width
    return 0
