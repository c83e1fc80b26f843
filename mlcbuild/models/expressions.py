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
    ast.FloorDiv: operator.floordiv,
}


def evaluate(expression: object, names: Mapping[str, Any]) -> Any:
    """The value of an expression over `names`; anything but a string is its own value.

    Raises MlcBuildError for a name that is not known and for syntax outside names, numbers, `+ - * //` and `not`.
    """
    if not isinstance(expression, str):
        return expression
    try:
        return _value(ast.parse(expression, mode="eval").body, names)
    except (SyntaxError, KeyError, ZeroDivisionError, TypeError) as error:
        raise MlcBuildError(
            f"cannot evaluate `{expression}` ({error}); it may use numbers, `+ - * //`, `not` and the names "
            f"{', '.join(sorted(names))}"
        ) from None


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_value(node.left, names), _value(node.right, names))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _value(node.operand, names)
    raise SyntaxError(f"`{ast.unparse(node)}` is not allowed")
