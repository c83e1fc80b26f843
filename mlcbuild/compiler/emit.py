"""A kernel added to a module, and called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax, tirx

from mlcbuild.models.operations import Expr


def call(
    builder: relax.BlockBuilder, function: Any, name: str, arguments: Sequence[Expr], shape: Sequence[Expr], dtype: str
) -> Expr:
    """What the PrimFunc `function`, called `name` in the module, makes of `arguments`: one tensor."""
    return call_all(builder, function, name, arguments, [(shape, dtype)])[0]


def call_all(
    builder: relax.BlockBuilder,
    function: Any,
    name: str,
    arguments: Sequence[Expr],
    results: Sequence[tuple[Sequence[Expr], str]],
) -> list[Expr]:
    """The same for as many tensors as `results` has shapes and dtypes."""
    kernel = builder.add_func(function, name)
    types = [relax.TensorType(list(shape), dtype) for shape, dtype in results]
    out = builder.emit(relax.call_tir(kernel, list(arguments), out_ty=types if len(types) > 1 else types[0]))
    return [builder.emit(relax.TupleGetItem(out, i)) for i in range(len(types))] if len(types) > 1 else [out]


def size(dimension: Expr) -> int | str:
    """A dimension of a weight as kernels are told it: a symbolic one is the vocabulary's, `rows`."""
    return "rows" if isinstance(dimension, tirx.Var) else int(dimension)
