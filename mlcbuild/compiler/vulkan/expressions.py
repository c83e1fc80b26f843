"""TIR's expressions in SPIR-V: arithmetic, reads of memory, and what is computed under a condition only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mlcbuild.compiler.vulkan import arithmetic
from mlcbuild.compiler.vulkan.opcodes import Op
from mlcbuild.compiler.vulkan.spirv import BOOL, Array, Module, Type, Value
from mlcbuild.errors import MlcBuildError

_DTYPE = re.compile(r"(bool|int|uint|float)(\d*)(?:x(\d+))?")
_MOST_LANES = 4
T = TypeVar("T")


def type_of(dtype: Any) -> Type:
    match = _DTYPE.fullmatch(str(dtype))
    if match is None:
        raise MlcBuildError(f"dtype {dtype}")
    code, bits, lanes = match.groups()
    if int(lanes or 1) > _MOST_LANES:
        raise MlcBuildError(f"{dtype}: vectors have {_MOST_LANES} lanes at most")
    return Type(code, int(bits or 1), int(lanes or 1))


def constant_of(node: Any, what: str) -> int:
    value = getattr(node, "value", node)
    if not isinstance(value, int):
        raise MlcBuildError(f"{what} that is not constant")
    return value


class Expressions:
    """What the variables of a kernel are, by their addresses: values, and memory."""

    def __init__(self) -> None:
        self.module = Module()
        self.values: dict[int, Value] = {}
        self.arrays: dict[int, Array] = {}

    def expression(self, node: Any) -> Value:
        kind = type(node).__name__
        if kind in ("And", "Or") and _reads_memory(node.b):
            # The right side's reads may be out of bounds where the left side has decided already.
            decided = self.module.constant(BOOL, kind == "Or")
            left, right = self.expression(node.a), lambda: self.expression(node.b)
            either = (right, lambda: decided) if kind == "And" else (lambda: decided, right)
            return self.joined(left, *either)
        if kind in arithmetic.OPERATORS:
            return arithmetic.binary(self.module, kind, self.expression(node.a), self.expression(node.b))
        visit = _EXPRESSIONS.get(kind)
        if visit is None:
            raise MlcBuildError(f"the expression {kind}")
        return visit(self, node)

    def branches(self, condition: Value, then: Callable[[], T], otherwise: Callable[[], T]) -> list[tuple[T, int]]:
        """Either of two, and control together again: what each gave, and the block in which it ended."""
        module = self.module
        first, second, merge = module.new(), module.new(), module.new()
        module.effect(Op.SelectionMerge, merge, 0)
        module.effect(Op.BranchConditional, condition.id, first, second)
        results = []
        for label, made in ((first, then), (second, otherwise)):
            module.start(label)
            results.append((made(), module.label))
            module.effect(Op.Branch, merge)
        module.start(merge)
        return results

    def joined(self, condition: Value, then: Callable[[], Value], otherwise: Callable[[], Value]) -> Value:
        (a, after_a), (b, after_b) = self.branches(condition, then, otherwise)
        return self.module.phi(a.type, a.id, after_a, b.id, after_b)[0]

    def variable(self, node: Any) -> Value:
        if hash(node) not in self.values:
            raise MlcBuildError(f"the variable {node.name}, which has no value")
        return self.values[hash(node)]

    def literal(self, node: Any) -> Value:
        return self.module.constant(type_of(node.ty.dtype), node.value)

    def inverse(self, node: Any) -> Value:
        return arithmetic.invert(self.module, self.expression(node.a))

    def converted(self, node: Any) -> Value:
        return arithmetic.cast(self.module, self.expression(node.value), type_of(node.ty.dtype))

    def chosen(self, node: Any) -> Value:
        parts = (self.expression(each) for each in (node.condition, node.true_value, node.false_value))
        return arithmetic.select(self.module, *parts)

    def let(self, node: Any) -> Value:
        self.values[hash(node.var)] = self.expression(node.value)
        return self.expression(node.body)

    def broadcast(self, node: Any) -> Value:
        return self.module.splat(self.expression(node.value), type_of(node.ty.dtype).lanes)

    def ramp(self, node: Any) -> Value:
        of = type_of(node.ty.dtype)
        return self.module.pure(Op.CompositeConstruct, of, *(each.id for each in self.steps(node, of.lanes)))

    def steps(self, node: Any, lanes: int) -> list[Value]:
        """The lanes of a Ramp, each as a number."""
        base, stride = self.expression(node.base), self.expression(node.stride)
        found = [base]
        for i in range(1, lanes):
            offset = arithmetic.binary(self.module, "Mul", stride, self.module.constant(stride.type, i))
            found.append(arithmetic.binary(self.module, "Add", base, offset))
        return found

    def element(self, node: Any) -> Value:
        """One lane of a vector; or a vector of numbers."""
        vectors, indices = list(node.vectors), list(node.indices)
        of = type_of(node.ty.dtype)
        if of.lanes == len(vectors) > 1:
            numbers = [self.expression(vectors[constant_of(index, "a lane")]) for index in indices]
            if all(each.type == of.scalar for each in numbers):
                return self.module.pure(Op.CompositeConstruct, of, *(each.id for each in numbers))
        if len(vectors) != 1 or len(indices) != 1:
            raise MlcBuildError("a Shuffle of parts of vectors")
        value = self.expression(vectors[0])
        return self.module.pure(Op.CompositeExtract, value.type.scalar, value.id, constant_of(indices[0], "a lane"))

    def load(self, node: Any) -> Value:
        (index,) = node.indices
        array, wanted = self.arrays[hash(node.source)], type_of(node.ty.dtype)
        stored = wanted
        if wanted.code == "bool":
            stored = Type(array.element.code, array.element.bits, wanted.lanes)
        parts = [self.module.load(array, at) for at in self.places(index, stored, array)]
        value = parts[0]
        if stored != array.element:
            value = self.module.pure(Op.CompositeConstruct, stored, *(each.id for each in parts))
        return arithmetic.cast(self.module, value, wanted)

    def places(self, index: Any, of: Type, array: Array) -> list[Value]:
        """Where in `array` the parts of a value are: one place, or one for each lane."""
        if of == array.element:
            return [self.expression(index)]
        if of.scalar != array.element:
            raise MlcBuildError(f"an access of {of} to memory of {array.element}")
        if type(index).__name__ == "Ramp":
            return self.steps(index, of.lanes)
        value = self.expression(index)
        scalar = value.type.scalar
        return [self.module.pure(Op.CompositeExtract, scalar, value.id, i) for i in range(of.lanes)]

    def call(self, node: Any) -> Value:
        name, arguments = str(getattr(node.op, "name", node.op)), list(node.args)
        of = type_of(node.ty.dtype)
        short = name.rpartition(".")[2]
        if short == "if_then_else":
            condition, then, otherwise = arguments
            return self.joined(
                self.expression(condition), lambda: self.expression(then), lambda: self.expression(otherwise)
            )
        if short == "tvm_thread_invariant":
            return self.expression(arguments[0])
        if short == "reinterpret":
            return arithmetic.reinterpret(self.module, self.expression(arguments[0]), of)
        if short == "large_uint_imm":
            low, high = (each.value for each in arguments)
            return self.module.constant(of, high << 32 | low)
        if short == "call_pure_extern":
            short, arguments = str(arguments[0].value), arguments[1:]
        if short in _OPERATORS:
            return arithmetic.binary(self.module, _OPERATORS[short], *map(self.expression, arguments))
        return arithmetic.call(self.module, short, [self.expression(each) for each in arguments])


_OPERATORS = {
    "bitwise_and": "BitwiseAnd",
    "bitwise_or": "BitwiseOr",
    "bitwise_xor": "BitwiseXor",
    "shift_left": "LShift",
    "shift_right": "RShift",
}
_EXPRESSIONS: Mapping[str, Callable[[Expressions, Any], Value]] = {
    "Var": Expressions.variable,
    "IntImm": Expressions.literal,
    "FloatImm": Expressions.literal,
    "Not": Expressions.inverse,
    "BitwiseNot": Expressions.inverse,
    "Cast": Expressions.converted,
    "Select": Expressions.chosen,
    "Let": Expressions.let,
    "Broadcast": Expressions.broadcast,
    "Ramp": Expressions.ramp,
    "Shuffle": Expressions.element,
    "TensorLoad": Expressions.load,
    "Call": Expressions.call,
}


def _reads_memory(node: Any) -> bool:
    """Whether an expression may read memory: anything that is not plain arithmetic counts."""
    kind = type(node).__name__
    if kind in arithmetic.OPERATORS:
        return _reads_memory(node.a) or _reads_memory(node.b)
    if kind in ("Not", "BitwiseNot"):
        return _reads_memory(node.a)
    return kind not in ("Var", "IntImm", "FloatImm") and not (kind == "Cast" and not _reads_memory(node.value))
