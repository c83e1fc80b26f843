"""TIR's operators and mathematical functions in SPIR-V: which instruction, by the operands' type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from mlcbuild.compiler.vulkan.opcodes import Op
from mlcbuild.compiler.vulkan.spirv import BOOL, Module, Type, Value
from mlcbuild.errors import MlcBuildError

_Ops = Mapping[str, Op]
_INTEGERS = ("int", "uint")
T = TypeVar("T")


def _same(op: Op) -> _Ops:
    return dict.fromkeys(_INTEGERS, op)


# TIR's node -> the operands' code -> instruction.
_BINARY: Mapping[str, _Ops] = {
    "Add": {**_same(Op.IAdd), "float": Op.FAdd},
    "Sub": {**_same(Op.ISub), "float": Op.FSub},
    "Mul": {**_same(Op.IMul), "float": Op.FMul},
    "Div": {"int": Op.SDiv, "uint": Op.UDiv, "float": Op.FDiv},
    "Mod": {"uint": Op.UMod, "float": Op.FRem},
    "FloorDiv": {"uint": Op.UDiv},
    "FloorMod": {"uint": Op.UMod, "float": Op.FMod},
    "BitwiseAnd": {**_same(Op.BitwiseAnd), "bool": Op.LogicalAnd},
    "BitwiseOr": {**_same(Op.BitwiseOr), "bool": Op.LogicalOr},
    "BitwiseXor": {**_same(Op.BitwiseXor), "bool": Op.LogicalNotEqual},
    "LShift": _same(Op.ShiftLeftLogical),
    "RShift": {"int": Op.ShiftRightArithmetic, "uint": Op.ShiftRightLogical},
    "And": {"bool": Op.LogicalAnd},
    "Or": {"bool": Op.LogicalOr},
}
_COMPARISONS: Mapping[str, _Ops] = {
    "EQ": {**_same(Op.IEqual), "float": Op.FOrdEqual, "bool": Op.LogicalEqual},
    "NE": {**_same(Op.INotEqual), "float": Op.FUnordNotEqual, "bool": Op.LogicalNotEqual},
    "LT": {"int": Op.SLessThan, "uint": Op.ULessThan, "float": Op.FOrdLessThan},
    "LE": {"int": Op.SLessThanEqual, "uint": Op.ULessThanEqual, "float": Op.FOrdLessThanEqual},
    "GT": {"int": Op.SGreaterThan, "uint": Op.UGreaterThan, "float": Op.FOrdGreaterThan},
    "GE": {"int": Op.SGreaterThanEqual, "uint": Op.UGreaterThanEqual, "float": Op.FOrdGreaterThanEqual},
}
_NOT: _Ops = {**_same(Op.Not), "bool": Op.LogicalNot}
# Numbers of GLSL.std.450.
_EXTREMES = {"Min": {"float": 37, "uint": 38, "int": 39}, "Max": {"float": 40, "uint": 41, "int": 42}}
_FUNCTIONS = {
    "round": 2, "nearbyint": 2, "rint": 2, "trunc": 3, "fabs": 4, "floor": 8, "ceil": 9, "sin": 13, "cos": 14,
    "tan": 15, "asin": 16, "acos": 17, "atan": 18, "sinh": 19, "cosh": 20, "tanh": 21, "atan2": 25, "pow": 26,
    "exp": 27, "log": 28, "exp2": 29, "log2": 30, "sqrt": 31, "rsqrt": 32, "fma": 50,
}  # fmt: skip
_CLAMP = 43
_TANH_IS_ONE = 15.0  # in float32; drivers make tanh of exponentials, which overflow further out
OPERATORS = (*_BINARY, *_COMPARISONS, *_EXTREMES)


def binary(module: Module, operator: str, a: Value, b: Value) -> Value:
    """`operator` is the name of a TIR node, of OPERATORS."""
    code = a.type.code
    if operator in _EXTREMES:
        return module.extended(_pick(_EXTREMES, operator, a.type), a.type, a.id, b.id)
    if operator in _COMPARISONS:
        return module.pure(_pick(_COMPARISONS, operator, a.type), BOOL.of(a.type.lanes), a.id, b.id)
    if operator in ("Mod", "FloorDiv", "FloorMod") and code == "int":
        return _quotient_or_rest(module, operator, a, b)
    if operator == "FloorDiv" and code == "float":
        return call(module, "floor", [module.pure(Op.FDiv, a.type, a.id, b.id)])
    return module.pure(_pick(_BINARY, operator, a.type), a.type, a.id, b.id)


def _quotient_or_rest(module: Module, operator: str, a: Value, b: Value) -> Value:
    """Mod, FloorDiv or FloorMod of signed integers, by SDiv: SRem and SMod of negative ones are undefined in Vulkan."""
    of = a.type
    quotient = module.pure(Op.SDiv, of, a.id, b.id)
    rest = module.pure(Op.ISub, of, a.id, module.pure(Op.IMul, of, quotient.id, b.id).id)
    if operator == "Mod":
        return rest
    zero = module.constant(of, 0)
    apart = binary(module, "LT", module.pure(Op.BitwiseXor, of, rest.id, b.id), zero)
    down = binary(module, "And", binary(module, "NE", rest, zero), apart)
    if operator == "FloorMod":
        return select(module, down, binary(module, "Add", rest, b), rest)
    return select(module, down, binary(module, "Sub", quotient, module.constant(of, 1)), quotient)


def _pick(table: Mapping[str, Mapping[str, T]], operator: str, of: Type) -> T:
    found = table[operator].get(of.code)
    if found is None:
        raise MlcBuildError(f"{operator} of {of}")
    return found


def invert(module: Module, a: Value) -> Value:
    return module.pure(_NOT[a.type.code], a.type, a.id)


def call(module: Module, name: str, arguments: list[Value]) -> Value:
    """A function of mathematics, by TIR's or C's name. Raises MlcBuildError for one that GLSL.std.450 does not have."""
    of = arguments[0].type
    if name == "isnan":
        return module.pure(Op.IsNan, BOOL.of(of.lanes), arguments[0].id)
    if name == "popcount":
        return module.pure(Op.BitCount, of, arguments[0].id)
    if name not in _FUNCTIONS:
        name = name.removesuffix("f")
    if name not in _FUNCTIONS or of.code != "float":
        raise MlcBuildError(f"{name} of {of}")
    if name == "tanh":
        bounds = [module.constant(of, each).id for each in (-_TANH_IS_ONE, _TANH_IS_ONE)]
        arguments = [module.extended(_CLAMP, of, arguments[0].id, *bounds)]
    return module.extended(_FUNCTIONS[name], of, *(each.id for each in arguments))


def select(module: Module, condition: Value, a: Value, b: Value) -> Value:
    if condition.type.lanes < a.type.lanes:
        condition = module.splat(condition, a.type.lanes)
    return module.pure(Op.Select, a.type, condition.id, a.id, b.id)


def cast(module: Module, value: Value, to: Type) -> Value:
    """`value` as a number of another type, rounded and cut off as C does."""
    source = value.type
    if source == to:
        return value
    if source.code == "bool":
        return select(module, value, module.constant(to, 1), module.constant(to, 0))
    if to.code == "bool":
        return binary(module, "NE", value, module.constant(source, 0))
    if "float" in (source.code, to.code):
        return module.pure(_CONVERSIONS[source.code, to.code], to, value.id)
    if source.bits != to.bits:
        # The signs of the wider number come from the narrow one's; UConvert makes unsigned numbers only.
        if source.code == "int":
            return module.pure(Op.SConvert, to, value.id)
        value = module.pure(Op.UConvert, Type("uint", to.bits, to.lanes), value.id)
    return reinterpret(module, value, to)


_CONVERSIONS = {
    ("float", "float"): Op.FConvert,
    ("float", "int"): Op.ConvertFToS,
    ("float", "uint"): Op.ConvertFToU,
    ("int", "float"): Op.ConvertSToF,
    ("uint", "float"): Op.ConvertUToF,
}


def reinterpret(module: Module, value: Value, to: Type) -> Value:
    """The same bits, called another type."""
    return value if value.type == to else module.pure(Op.Bitcast, to, value.id)
