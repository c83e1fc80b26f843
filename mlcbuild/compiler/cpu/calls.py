"""TIR functions around calls of C kernels: buffers in, buffers out, loops over tasks that threads share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

Buffer = Any
SERIAL = 4  # rows that take less time than waking the other threads
Shape = Sequence[int | str]  # a name is a symbolic dimension, "name + 1" one more


@dataclass(frozen=True)
class Flag:
    """A kernel's `i32` argument that is 0 or 1."""

    on: bool


def function(
    name: str,
    inputs: Sequence[tuple[Shape, str]],
    outputs: Sequence[tuple[Shape, str]],
    body: Callable[[dict[str, Any], Sequence[Buffer], Sequence[Buffer]], None],
    scalars: Mapping[str, str] = {},
) -> Any:
    """A PrimFunc over buffers of the given shapes and dtypes, and after them scalars: a dtype for each name.

    `body(symbols, inputs, outputs)` emits its statements with `for_each` and `call`; scalars are among the symbols.
    Inputs of whole numbers may begin anywhere in their memory: a KV cache gives parts of larger arrays.
    """
    symbols: dict[str, Any] = {}

    def dimension(size: int | str) -> Any:
        if not isinstance(size, str):
            return size
        name = size.removesuffix(" + 1")
        return symbols.setdefault(name, tirx.Var(name, "int64")) + (0 if name == size else 1)

    def offset(index: int, dtype: str) -> Any:
        return tirx.Var(f"offset_{index}", "int64") if dtype == "int32" and index < len(inputs) else None

    with IRBuilder() as builder:
        with T.prim_func(is_private=True, s_tir=True):
            T.func_name(name)
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
            described = [*inputs, *outputs]
            handles = [T.arg(f"buffer_{i}", T.handle()) for i in range(len(described))]
            symbols.update((name, T.arg(name, tirx.Var(name, dtype))) for name, dtype in scalars.items())
            buffers = [
                T.match_buffer(handle, tuple(dimension(size) for size in shape), dtype, elem_offset=offset(i, dtype))
                for i, (handle, (shape, dtype)) in enumerate(zip(handles, described, strict=True))
            ]
            with T.sblock(name):
                T.reads(*map(_whole, buffers[: len(inputs)]))
                T.writes(*map(_whole, buffers[len(inputs) :]))
                body(symbols, buffers[: len(inputs)], buffers[len(inputs) :])
        return builder.get()


def by_row(
    name: str,
    kernel: str,
    inputs: Sequence[tuple[Shape, str] | None],
    outputs: Sequence[tuple[Shape, str]],
    *rest: Any,
) -> Any:
    """A PrimFunc that calls the C function `kernel` for each row i of n: with the buffers, i, and `rest`.

    An input that is None is a null pointer to the kernel, and no argument of the PrimFunc.
    """

    def body(symbols: dict[str, Any], given: Sequence[Buffer], results: Sequence[Buffer]) -> None:
        there = iter(given)
        buffers = [None if each is None else next(there) for each in inputs]
        for_each(symbols["n"], lambda i: call(kernel, *buffers, *results, i, *rest), SERIAL)

    return function(name, [each for each in inputs if each is not None], outputs, body)


def scratch(size: Any, dtype: str = "float32") -> Buffer:
    """Memory for the duration of a call."""
    return T.sblock_alloc_buffer((size,), dtype)


def call(kernel: str, *arguments: Any) -> None:
    """Call a C function: buffers are given by address, integers with 64 bits, flags with 32, None as a null pointer."""
    T.evaluate(T.call_extern("void", kernel, *map(_argument, arguments)))


def for_each(count: Any, body: Callable[[Any], None], serial_up_to: int = 1) -> None:
    """`body(i)` for i < `count`, on all threads from `serial_up_to` + 1 on: waking them costs microseconds."""
    if isinstance(count, int):
        with T.serial(count) if count <= serial_up_to else T.parallel(count) as i:
            body(i)
        return
    with T.If(count <= serial_up_to):
        with T.Then(), T.serial(count) as i:
            body(i)
        with T.Else(), T.parallel(count) as i:
            body(i)


def _whole(buffer: Buffer) -> Any:
    return buffer[tuple(slice(0, size) for size in buffer.shape)]


def _argument(value: Any) -> Any:
    if value is None:
        return tirx.const(0, "int64")
    if isinstance(value, int):
        return tirx.const(value, "int64")
    if isinstance(value, Flag):
        return tirx.const(int(value.on), "int32")
    data = getattr(value, "data", None)
    if data is None:
        # Of an argument with 32 bits on the stack, the upper half of its place is whatever lay there before.
        return value.astype("int64") if str(value.ty.dtype) == "int32" else value
    if isinstance(value.elem_offset, tirx.Var):
        return T.address_of(value[(0,) * len(value.shape)])
    return data
