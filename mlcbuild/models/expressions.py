"""The small expressions of architecture files: `hidden_size // num_attention_heads`, `not tie_word_embeddings`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from mlcbuild.errors import MlcBuildError

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda item, of: item in of,
    ast.NotIn: lambda item, of: item not in of,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"int": int, "min": min, "max": max, "len": len}


def evaluate(expression: object, names: Mapping[str, Any]) -> Any:
    """The value of an expression over `names`; anything but a string is its own value.

    Beside names, numbers, texts, tuples, True, False and None it may have `+ - * / // % **`, comparisons, `in`,
    `and or not`, `a if b else c`, int min max len, and `each_layer(x)`: a tuple of x for `layer` from 0 to
    num_hidden_layers - 1. Raises MlcBuildError for anything else, and for a name that is not known.
    """
    if not isinstance(expression, str):
        return expression
    try:
        return _value(ast.parse(expression, mode="eval").body, names)
    except (SyntaxError, KeyError, ZeroDivisionError, OverflowError, TypeError, ValueError, IndexError) as error:
        raise MlcBuildError(
            f"cannot evaluate `{expression}` ({error}); it may use numbers, `+ - * / // % **`, comparisons, "
            f"`and or not`, `a if b else c`, int, min, max, len, each_layer, and the names {', '.join(sorted(names))}"
        ) from None


def names_in(expression: object) -> list[str]:
    """The names that an expression depends on, in its order; none where it is no expression."""
    try:
        tree = ast.parse(expression if isinstance(expression, str) else "", mode="eval")
    except SyntaxError:  # told by `evaluate`
        return []
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Name(id=name):
            return names[name]
        case ast.Constant(value=value):
            return value
        case ast.Tuple(elts=items):
            return tuple(_value(item, names) for item in items)
        case ast.Subscript(value=of, slice=index):
            return _value(of, names)[_value(index, names)]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left, names), _value(right, names))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, names)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names)
        case ast.BoolOp(op=op, values=values):
            return (all if isinstance(op, ast.And) else any)(_value(value, names) for value in values)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return _COMPARE[type(op)](_value(left, names), _value(right, names))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, names) else orelse, names)
        case ast.Call(func=ast.Name(id="each_layer"), args=[item], keywords=[]):
            return tuple(_value(item, {**names, "layer": layer}) for layer in range(names["num_hidden_layers"]))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(arg, names) for arg in args))
    raise SyntaxError(f"`{ast.unparse(node)}` is not allowed")
