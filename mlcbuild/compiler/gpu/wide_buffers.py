"""Kernels whose buffers are arrays of vectors where they are read as nothing else: one load of 16 bytes, not four.

Metal and OpenCL read a vector wherever it lies. In WGSL and SPIR-V a buffer's element has one type, and from an array
of numbers a vector is read number by number.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import IRModule, ir, sym, tirx

from mlcbuild.compiler.gpu.rewriting import nodes


def widened(functions: IRModule) -> IRModule:
    """The kernels as a code generator is given them, with buffers of vectors."""
    return IRModule({gv: kernel(function) for gv, function in functions.functions_items()}, attrs=functions.attrs)


def kernel(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """One of them."""
    memory: dict[Any, Any] = {}  # by buffer: the parameter that it is
    for declared in nodes(function.body, tirx.DeclBuffer):
        data = declared.data.args[0] if isinstance(declared.data, ir.Call) else declared.data
        memory[declared.buffer] = memory.get(data, data)  # one buffer may be another name for what a second one is
    stored = {memory.get(store.buffer) for store in nodes(function.body, tirx.BufferStore)}
    loads: dict[Any, dict[Any, list[Any]]] = {}  # by parameter and buffer
    for load in nodes(function.body, ir.TensorLoad):
        loads.setdefault(memory.get(load.source), {}).setdefault(load.source, []).append(load)
    changed = {}
    for param in function.params:
        if param in loads and param not in stored and len(loads[param]) == 1:
            ((buffer, read),) = loads[param].items()
            lanes = _lanes(read)
            if lanes > 1:
                changed[param] = _of_vectors(param, buffer, lanes)
    return _rewritten(function, changed, memory) if changed else function


def _lanes(loads: list[Any]) -> int:
    """Of the vectors that all of a buffer's `loads` are, each at a multiple of its lanes; 1 where they are not."""
    lanes = {load.ty.dtype.lanes for load in loads}
    if len(lanes) != 1 or lanes & {3}:
        return 1
    (count,) = lanes
    aligned = all(isinstance(load.indices[0], tirx.Ramp) and _multiple(load.indices[0], count) for load in loads)
    return count if aligned else 1


def _multiple(index: Any, lanes: int) -> bool:
    found = sym.Analyzer().modular_set(index.base)
    return bool(index.stride == 1 and found.coeff % lanes == 0 and found.base % lanes == 0)


def _of_vectors(param: Any, buffer: Any, lanes: int) -> tuple[Any, Any, Any, int]:
    """Such a buffer, a parameter for it, the buffer in whose place it is, and the numbers of its vectors."""
    dtype = f"{buffer.ty.dtype}x{lanes}"
    data = tirx.Var(param.name, ir.PointerType(ir.PrimType(dtype), "global"))
    return tirx.decl_buffer((buffer.ty.shape[0] // lanes,), dtype, buffer.name, data=data), data, buffer, lanes


def _rewritten(function: tirx.PrimFunc, changed: dict[Any, Any], memory: dict[Any, Any]) -> tirx.PrimFunc:
    by_buffer = {old: (new, data, lanes) for new, data, old, lanes in changed.values()}

    def load(node: Any) -> Any:
        if node.source not in by_buffer:
            return node
        new, _, lanes = by_buffer[node.source]
        base = node.indices[0].base
        index = sym.Analyzer().simplify(base // lanes)
        if nodes(index, tirx.FloorDiv):  # which no code generator has any more
            index = base >> lanes.bit_length() - 1
        return tirx.BufferLoad(new, [index])

    def declare(node: Any) -> Any:
        if node.buffer in by_buffer:
            new, data, _ = by_buffer[node.buffer]
            return tirx.DeclBuffer(new, data=data)
        return tirx.Evaluate(0) if memory[node.buffer] in changed else node  # a name that nothing is read by

    body = tvm_ffi.structural_map(function.body, [(ir.TensorLoad, load), (tirx.DeclBuffer, declare)])
    params = [changed[param][1] if param in changed else param for param in function.params]
    return tirx.PrimFunc(params, body, function.ret_type, function.attrs)
