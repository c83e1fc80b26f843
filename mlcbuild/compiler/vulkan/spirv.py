"""A SPIR-V module under construction: numbers for types, constants and results, and instructions in their sections.

Layout and enumerants: the SPIR-V specification 1.0, sections 2.3, 2.4 and 3; extended instructions: GLSL.std.450. What
is not in version 1.0 is declared as an extension, so that a device need not have more than Vulkan 1.0 and those.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from mlcbuild.compiler.vulkan.opcodes import Op, Storage

_MAGIC, _VERSION = 0x07230203, 0x00010000
_SHADER, _FLOAT16, _INT64, _INT16, _INT8, _BUFFER16, _BUFFER8 = 1, 9, 11, 22, 39, 4433, 4448
_BLOCK, _ARRAY_STRIDE, _BUILT_IN, _COHERENT, _NON_WRITABLE = 2, 6, 11, 23, 24
_BINDING, _DESCRIPTOR_SET, _OFFSET = 33, 34, 35
_LOCAL_SIZE, _GL_COMPUTE, _LOGICAL, _GLSL450 = 17, 5, 0, 1
_NEEDS = {("int", 64): _INT64, ("int", 16): _INT16, ("int", 8): _INT8, ("float", 16): _FLOAT16}
_WORKGROUP = 2  # scope
_BARRIER = 0x8 | 0x100 | 0x40  # acquire and release, of what a block shares and of buffers
_FEATURES = {
    _FLOAT16: "float16", _INT64: "int64", _INT16: "int16", _INT8: "int8", _BUFFER16: "16bit_buffer",
    _BUFFER8: "8bit_buffer",
}  # fmt: skip
_IN_BUFFERS = {8: (_BUFFER8, "SPV_KHR_8bit_storage"), 16: (_BUFFER16, "SPV_KHR_16bit_storage")}


@dataclass(frozen=True)
class Type:
    """What a value is: code is bool, int, uint or float; lanes above one make a vector."""

    code: str
    bits: int
    lanes: int = 1

    @property
    def scalar(self) -> Type:
        return Type(self.code, self.bits)

    def of(self, lanes: int) -> Type:
        return Type(self.code, self.bits, lanes)

    def __str__(self) -> str:
        return f"{self.code}{self.bits if self.code != 'bool' else ''}{f'x{self.lanes}' if self.lanes > 1 else ''}"


BOOL, INT32, UINT32 = Type("bool", 1), Type("int", 32), Type("uint", 32)


@dataclass(frozen=True)
class Value:
    """The result of an instruction: its number and type."""

    id: int
    type: Type


@dataclass(frozen=True)
class Array:
    """Memory that is indexed: the number of its variable, whether that is a struct around the array, and where."""

    id: int
    element: Type
    storage: Storage
    wrapped: bool
    volatile: bool = False


class Module:
    """One compute kernel. Instructions are appended in the order of execution; `assemble` puts everything in order.

    `label` is the block that instructions go into; a result that is computed twice in one block is computed once.
    """

    def __init__(self) -> None:
        self._last = 0
        self.label = self._entry = self.new()
        self._capabilities, self._extensions = {_SHADER: None}, {"SPV_KHR_storage_buffer_storage_class": None}
        self._decorations: list[list[int]] = []
        self._globals: list[list[int]] = []
        self._variables: list[list[int]] = []
        self._body: list[list[int]] = []
        self._known: dict[tuple[object, ...], int] = {}
        self._in_block: dict[tuple[int, ...], int] = {}
        self._inputs: dict[int, int] = {}
        self._buffers: set[int] = set()
        self._loaded: set[int] = set()
        self._stored: set[int] = set()
        self._barriers = False
        self._extended = self.new()

    @property
    def features(self) -> set[str]:
        """What a device must have besides what all have, by the names of a target's `supports`."""
        return {"storage_buffer_storage_class", *(_FEATURES[n] for n in self._capabilities if n in _FEATURES)}

    def new(self) -> int:
        self._last += 1
        return self._last

    # Types and constants

    def type(self, of: Type) -> int:
        if of.lanes > 1:
            return self._global(("vector", of), Op.TypeVector, self.type(of.scalar), of.lanes)
        needs = _NEEDS.get((of.code.removeprefix("u"), of.bits))
        if needs is not None:
            self._capabilities[needs] = None
        if of.code == "bool":
            return self._global(of, Op.TypeBool)
        if of.code == "float":
            return self._global(of, Op.TypeFloat, of.bits)
        return self._global(of, Op.TypeInt, of.bits, int(of.code == "int"))

    def constant(self, of: Type, value: float) -> Value:
        """A scalar, or a vector with `value` in every lane."""
        if of.lanes > 1:
            return self.splat(self.constant(of.scalar, value), of.lanes)
        kind = self.type(of)
        if of.code == "bool":
            op = Op.ConstantTrue if value else Op.ConstantFalse
            return Value(self._global((of, bool(value)), op, typed=kind), of)
        words = _words(of, value)
        return Value(self._global((of, *words), Op.Constant, *words, typed=kind), of)

    def splat(self, value: Value, lanes: int) -> Value:
        return self.pure(Op.CompositeConstruct, value.type.of(lanes), *[value.id] * lanes)

    def pointer(self, storage: Storage, to: int) -> int:
        return self._global(("pointer", storage, to), Op.TypePointer, storage, to)

    def _array_type(self, element: Type, count: int | None) -> int:
        """Without a count: one that lies in memory that the host fills."""
        kind = self.type(element)
        key = ("array", element, count)
        if count is not None:
            return self._global(key, Op.TypeArray, kind, self.constant(UINT32, count).id)
        made = self._global(key, Op.TypeRuntimeArray, kind)
        self._decorate([made, _ARRAY_STRIDE, element.bits // 8 * element.lanes])
        return made

    def _global(self, key: object, op: Op, *operands: int, typed: int | None = None) -> int:
        full = ("global", key)
        if full not in self._known:
            self._known[full] = self.new()
            self._globals.append([op, *([typed] if typed else []), self._known[full], *operands])
        return self._known[full]

    # Memory

    def buffer(self, element: Type, binding: int) -> Array:
        """A buffer that the kernel is given. Truth values are bytes there."""
        stored = Type("uint", 8) if element.code == "bool" else element
        if stored.bits in _IN_BUFFERS:
            capability, extension = _IN_BUFFERS[stored.bits]
            self._capabilities[capability] = self._extensions[extension] = None
        array = self._array_type(stored, None)
        struct_type = self._global(("block", array), Op.TypeStruct, array)
        self._decorate([struct_type, _BLOCK])
        self._decorate([struct_type, 0, _OFFSET, 0], Op.MemberDecorate)
        variable = self._variable(Storage.BUFFER, struct_type)
        self._bind(variable, binding)
        self._buffers.add(variable)
        return Array(variable, stored, Storage.BUFFER, True)

    def array(self, element: Type, count: int, shared: bool, volatile: bool) -> Array:
        """Memory of a block's threads together, or of each of them."""
        storage = Storage.WORKGROUP if shared else Storage.FUNCTION
        return Array(self._variable(storage, self._array_type(element, count)), element, storage, False, volatile)

    def scalars(self, types: Sequence[Type], binding: int | None) -> list[Value]:
        """The numbers that the kernel is given, eight bytes each: push constants, or a uniform buffer at `binding`."""
        storage = Storage.PUSH_CONSTANT if binding is None else Storage.UNIFORM
        kind = self._global("scalars", Op.TypeStruct, *map(self.type, types))
        self._decorate([kind, _BLOCK])
        for i in range(len(types)):
            self._decorate([kind, i, _OFFSET, 8 * i], Op.MemberDecorate)
        variable = self._variable(storage, kind)
        if binding is not None:
            self._bind(variable, binding)
        values = []
        for i, each in enumerate(types):
            pointer = self.new()
            self._emit(
                Op.AccessChain,
                self.pointer(storage, self.type(each)),
                pointer,
                variable,
                self.constant(UINT32, i).id,
            )
            values.append(self.result(Op.Load, each, pointer))
        return values

    def coordinate(self, built_in: int, axis: int) -> Value:
        """Component `axis` of WorkgroupId (26) or LocalInvocationId (27)."""
        triple = Type("uint", 32, 3)
        if built_in not in self._inputs:
            self._inputs[built_in] = self._variable(Storage.INPUT, self.type(triple))
            self._decorate([self._inputs[built_in], _BUILT_IN, built_in])
        return self.pure(Op.CompositeExtract, UINT32, self.pure(Op.Load, triple, self._inputs[built_in]).id, axis)

    def load(self, array: Array, index: Value) -> Value:
        self._loaded.add(array.id)
        return self.result(Op.Load, array.element, self._at(array, index), *([1] if array.volatile else []))

    def store(self, array: Array, index: Value, value: Value) -> None:
        self._stored.add(array.id)
        self._emit(Op.Store, self._at(array, index), value.id, *([1] if array.volatile else []))

    def barrier(self) -> None:
        """All threads of a block wait here, and see what each has written."""
        self._barriers = True
        self._emit(Op.ControlBarrier, *(self.constant(UINT32, n).id for n in (_WORKGROUP, _WORKGROUP, _BARRIER)))

    def _at(self, array: Array, index: Value) -> int:
        chain = [self.constant(UINT32, 0).id, index.id] if array.wrapped else [index.id]
        pointer = self.pointer(array.storage, self.type(array.element))
        return self._once(Op.AccessChain, pointer, array.id, *chain)

    def _variable(self, storage: Storage, kind: int) -> int:
        pointer, made = self.pointer(storage, kind), self.new()
        place = self._variables if storage is Storage.FUNCTION else self._globals
        place.append([Op.Variable, pointer, made, storage])
        return made

    def _bind(self, variable: int, binding: int) -> None:
        self._decorate([variable, _DESCRIPTOR_SET, 0])
        self._decorate([variable, _BINDING, binding])

    def _decorate(self, operands: list[int], op: Op = Op.Decorate) -> None:
        if [op, *operands] not in self._decorations:
            self._decorations.append([op, *operands])

    # Instructions

    def pure(self, op: Op, of: Type, *operands: int) -> Value:
        """The result of what has no effect, and is the same wherever in its block it is computed."""
        return Value(self._once(op, self.type(of), *operands), of)

    def extended(self, number: int, of: Type, *operands: int) -> Value:
        """An instruction of GLSL.std.450."""
        return self.pure(Op.ExtInst, of, self._extended, number, *operands)

    def result(self, op: Op, of: Type, *operands: int) -> Value:
        kind, made = self.type(of), self.new()
        self._emit(op, kind, made, *operands)
        return Value(made, of)

    def effect(self, op: Op, *operands: int) -> None:
        self._emit(op, *operands)

    def start(self, label: int) -> None:
        """What follows is in block `label`."""
        self.label = label
        self._in_block = {}
        self._emit(Op.Label, label)

    def phi(self, of: Type, *incoming: int) -> tuple[Value, list[int]]:
        """A value by where control came from; the instruction itself too, for what is known only later."""
        value = self.result(Op.Phi, of, *incoming)
        return value, self._body[-1]

    def _once(self, op: Op, kind: int, *operands: int) -> int:
        key = (op, kind, *operands)
        if key not in self._in_block:
            made = self.new()
            self._emit(op, kind, made, *operands)
            self._in_block[key] = made
        return self._in_block[key]

    def _emit(self, op: Op, *operands: int) -> None:
        self._body.append([op, *operands])

    def assemble(self, name: str, block: Sequence[int]) -> list[int]:
        """The module's words: `name` is what the host calls it, `block` the threads of a block along x, y, z."""
        if self._barriers:  # a block's threads need not share a cache, so what they tell each other must pass it by
            for variable in sorted(self._loaded & self._stored & self._buffers):
                self._decorate([variable, _COHERENT])
        for variable in sorted(self._buffers - self._stored):
            self._decorate([variable, _NON_WRITABLE])
        main, void = self.new(), self._global("void", Op.TypeVoid)
        function_type = self._global("function", Op.TypeFunction, void)
        head: list[list[int]] = [[Op.Capability, each] for each in self._capabilities]
        head += [[Op.Extension, *_text(each)] for each in self._extensions]
        head += [[Op.ExtInstImport, self._extended, *_text("GLSL.std.450")], [Op.MemoryModel, _LOGICAL, _GLSL450]]
        head += [[Op.EntryPoint, _GL_COMPUTE, main, *_text(name), *self._inputs.values()]]
        head += [[Op.ExecutionMode, main, _LOCAL_SIZE, *block]]
        function: list[list[int]] = [
            [Op.Function, void, main, 0, function_type],
            [Op.Label, self._entry],
            *self._variables,
        ]
        body: list[list[int]] = [*self._body, [Op.Return], [Op.FunctionEnd]]
        words = [_MAGIC, _VERSION, 0, self._last + 1, 0]
        sections: list[list[int]] = [*head, *self._decorations, *self._globals, *function, *body]
        for op, *operands in sections:
            words += [len(operands) + 1 << 16 | op, *operands]
        return words


def _text(text: str) -> list[int]:
    """A string as words: UTF-8, ended by at least one zero byte."""
    content = text.encode() + b"\0"
    content += bytes(-len(content) % 4)
    return list(struct.unpack(f"<{len(content) // 4}I", content))


def _words(of: Type, value: float) -> tuple[int, ...]:
    """A constant's words: narrow signed integers are sign-extended, wide numbers begin with the low word."""
    if of.code == "float":
        content = struct.pack({16: "<e", 32: "<f", 64: "<d"}[of.bits], value)
        return struct.unpack(f"<{max(of.bits // 32, 1)}I", content.ljust(4, b"\0"))
    bits = max(of.bits, 32)
    number = int(value) & (1 << bits) - 1
    return tuple(number >> shift & 0xFFFFFFFF for shift in range(0, bits, 32))
