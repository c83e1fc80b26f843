"""TVM's code generators, asked for the kernels of one scheduled TIR function."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

_HOST = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}


_SCRIPT = SimpleNamespace(
    int32=int, int64=int, Cast=lambda dtype, value: int(value), min=min, max=max, Div=operator.floordiv
)


@dataclass(frozen=True)
class Block:
    """The threads of a block along x, y, z, and how much shared memory its launch asks for."""

    threads: tuple[int, ...]
    shared_bytes: int


def device_functions(function: Any, device: Mapping[str, Any]) -> list[Any]:
    """The kernels as TVM gives them to a code generator, in the order in which they stand in the function."""
    import tvm

    found: list[Any] = []
    none = tvm.get_global_func("target.build.opencl")  # a module without a kernel in it

    def take(module: Any, target: Any) -> Any:
        found.extend(module.functions.values())
        return none(tvm.IRModule({}), tvm.target.Target("opencl"))

    with _generator(str(device["kind"]), take):
        _compiled(function, device)
    return sorted(found, key=lambda each: _number(str(each.attrs["global_symbol"])))


def source(function: Any, device: Mapping[str, Any]) -> tuple[str, dict[str, Block]]:
    """The kernels' source, and by their names, in their order, what a block of each is."""
    import tvm

    from mlcbuild.compiler.gpu import wide_buffers

    kind, blocks = str(device["kind"]), dict[str, Block]()
    generate = tvm.get_global_func(f"target.build.{kind}")

    def take(module: Any, target: Any) -> Any:
        for each in module.functions.values():
            blocks[str(each.attrs["global_symbol"])] = _block(each, int(device["max_shared_memory_per_block"]))
        return generate(wide_buffers.widened(module) if kind == "webgpu" else module, target)

    with _generator(kind, take):
        made = _compiled(function, device)
    code = made.mod.imports[0].inspect_source()
    return code, dict(sorted(blocks.items(), key=lambda item: _number(item[0])))


def library_source(lowered: Any, device: Mapping[str, Any]) -> str:
    """The source of all kernels of a lowered module."""
    import tvm

    from mlcbuild.compiler.link import export

    name, made = str(device["kind"]), list[Any]()
    generate = tvm.get_global_func(f"target.build.{name}")

    def take(module: Any, target: Any) -> Any:
        made.append(generate(module, target))
        return made[0]

    with _generator(name, take):
        export.generate(lowered, device, _HOST)
    return str(made[0].inspect_source())


def grids(function: Any, scalars: Mapping[str, int]) -> list[tuple[int, ...]]:
    """How many blocks along x, y, z each kernel of a scheduled function is launched with."""
    found, inside = list[dict[str, int]](), True
    for extent, of, axis in re.findall(
        r'in T.thread_binding\((.*), thread="(block|thread)Idx.(\w)"', function.script()
    ):
        if of == "block":
            if inside:  # threads came before: the next kernel
                found.append({})
            found[-1][axis] = eval(extent, {"T": _SCRIPT}, dict(scalars))  # the script's arithmetic is Python's
        inside = of == "thread"
    return [(axes.get("x", 1), axes.get("y", 1), axes.get("z", 1)) for axes in found]


def _compiled(function: Any, device: Mapping[str, Any]) -> Any:
    import tvm
    from tvm import target, transform

    both = target.Target(dict(device), host=_HOST)
    with both, transform.PassContext(config={"tirx.disable_cse_tir": True}):
        return tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target=both)


@contextmanager
def _generator(kind: str, function: Any) -> Iterator[None]:
    """TVM's code generator for a kind of device is `function` for a while."""
    import tvm
    import tvm_ffi

    name = f"target.build.{kind}"
    before = tvm.get_global_func(name, allow_missing=True)
    tvm_ffi.register_global_func(name, function, override=True)
    try:
        yield
    finally:
        if before is not None:
            tvm_ffi.register_global_func(name, before, override=True)


def _block(function: Any, most: int) -> Block:
    """`most`: bytes of shared memory that a block has, whatever its launch asks for."""
    import tvm
    import tvm_ffi
    from tvm import tirx

    threads: dict[str, int] = {}
    shared: dict[str, list[int]] = {}

    def axis(node: Any) -> Any:
        if node.attr_key == "thread_extent" and str(node.node.thread_tag).startswith("threadIdx"):
            threads[str(node.node.thread_tag)] = int(node.value)
        return node

    def memory(node: Any) -> Any:
        count = math.prod(map(int, node.buffer.shape))
        shared.setdefault(str(node.buffer.scope()), []).append(count * tvm.DataType(node.buffer.dtype).itemsize)
        return node

    tvm_ffi.structural_map(function.body, [(tirx.AttrStmt, axis), (tirx.AllocBuffer, memory)])
    assert sum(shared.get("shared", [])) <= most, f"{function.attrs['global_symbol']} does not fit into {most} bytes"
    return Block(tuple(threads.get(f"threadIdx.{axis}", 1) for axis in "xyz"), sum(shared.get("shared.dyn", [])))


def _number(name: str) -> int:
    return int(name.removeprefix("main_kernel").lstrip("_") or 0)
