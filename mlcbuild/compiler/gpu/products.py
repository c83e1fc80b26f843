"""Matrix products and embedding lookups on GPUs, as TIR functions that are not scheduled yet (see schedules.py)."""

from __future__ import annotations

import functools
from typing import Any

from tvm import te, tirx

from mlcbuild.compiler.gpu import cuda_rows, formats
from mlcbuild.compiler.gpu.rows import int64, private
from mlcbuild.recipes.types import Weights

PRODUCT = "product"  # the block that schedules.py looks for
STEP = "mlcbuild.step"  # attribute: how many neighbouring columns of the matrix one storage word holds
# relax's OpPatternKind. Fusible: element-wise operations that follow may become part of the function. The vocabulary's
# matrix is not: its rows are symbolic, and a fused function would have that symbol twice.
FUSIBLE, OPAQUE = 4, 8
# A part's name, its shape, with a name where a dimension is symbolic, and its dtype.
Part = tuple[str, tuple[int | str, ...], str]


@functools.cache
def linear(
    parts: tuple[Part, ...],
    weights: Weights | None,
    rows: int | str,
    in_features: int,
    dtype: str,
    out_dtype: str,
    wide: bool,
) -> Any:
    """x [n, in_features], the parts of w [rows, in_features] -> x · wᵀ [n, rows].

    `dtype` is the model dtype, which x has too. Sums are float32; with `wide`, so are the tiles of both operands.
    """
    symbols = {"rows": tirx.Var("rows", "int64")}
    height = symbols["rows"] if isinstance(rows, str) else int64(rows)
    n, width = tirx.Var("n", "int64"), int64(in_features)
    x = te.placeholder((n, width), dtype, "x")
    given = _placeholders(parts, symbols)
    read = formats.element(given, weights, dtype)
    w = given["weight"] if weights is None else te.compute((height, width), read, name="unpacked")
    left, right = (_wide(x), _wide(w)) if wide and dtype != "float32" else (x, w)
    k = te.reduce_axis((int64(0), width), "k")
    result = te.compute(
        (n, height),
        lambda i, j: te.sum(left[i, k].astype("float32") * right[j, k].astype("float32"), axis=k),
        name=PRODUCT,
        attrs=cuda_rows.format_of(weights, dtype),
    )
    if out_dtype != "float32":
        total = result
        result = te.compute((n, height), lambda i, j: total[i, j].astype(out_dtype), name="narrow")
    function = private([x, *given.values(), result])
    pattern = OPAQUE if isinstance(rows, str) else FUSIBLE
    return function.with_attr("op_pattern", pattern).with_attr(STEP, formats.words(weights))


@functools.cache
def embedding(parts: tuple[Part, ...], weights: Weights | None, hidden_size: int, dtype: str) -> Any:
    """ids int32 [n], the parts of w [V, hidden_size] -> rows of w [n, hidden_size] of the model dtype."""
    n = tirx.Var("n", "int64")
    ids = te.placeholder((n,), "int32", "ids")
    given = _placeholders(parts, {"rows": tirx.Var("rows", "int64")})
    read = formats.element(given, weights, dtype)
    result = te.compute((n, int64(hidden_size)), lambda i, k: read(ids[i], k), name="rows_of_embedding")
    return private([ids, *given.values(), result])


def _placeholders(parts: tuple[Part, ...], symbols: dict[str, Any]) -> dict[str, Any]:
    return {
        name: te.placeholder([symbols[n] if isinstance(n, str) else int64(n) for n in shape], dtype, name)
        for name, shape, dtype in parts
    }


def _wide(tensor: Any) -> Any:
    return te.compute(tensor.shape, lambda i, k: tensor[i, k].astype("float32"), name="wide")
