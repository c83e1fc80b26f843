"""The decoder's operations (mlcbuild.models.operations) as calls of a device's kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import relax, sym, te, tirx

from mlcbuild.models.operations import Expr, Operations
from mlcbuild.models.rope import Frequencies, Rotary
from mlcbuild.models.weights import Weight

# A part of a weight: its name, its shape, with a name where a dimension is symbolic, and its dtype.
Part = tuple[str, tuple[int | str, ...], str]


FEW = "mlcbuild.few"  # attribute of a product with experts: up to how many choices it reads no plan


@dataclass(frozen=True)
class Factories:
    """What makes the kernels of a device, for one model dtype: PrimFuncs for given sizes.

    compute: the dtype of what most of them give; embedding, norm_heads and rope give the model dtype
    operand: the dtype that `linear` and `expert_linear` take x in; None: in any
    linear(weight, columns, dtype of x, dtype of the result), embedding(weight, columns)
    rms_norm(width, eps), layer_norm(width, eps, with a weight, with a bias), gated and activation(name, width)
    norm_heads((heads, kv_heads), dim, shapes of the weights, spans, centred, eps)
    rope((heads, kv_heads), dim, rotary)
    choose_experts(experts, choices, normalised, scale), weighted_sum(choices, width)
    plan_experts(builder, chosen, number of experts, FEW): emits what `expert_linear` is given beside chosen experts
    expert_linear(weight, columns, choices, whether x has a row of its own for each choice), with an attribute FEW
    softmax(builder, logits, temperature): emits what gives the probabilities
    """

    compute: str
    operand: str | None
    linear: Callable[[Weight, int, str, str], Any]
    embedding: Callable[[Weight, int], Any]
    rms_norm: Callable[[int, float], Any]
    layer_norm: Callable[[int, float, bool, bool], Any]
    gated: Callable[[str, int], Any]
    activation: Callable[[str, int], Any]
    norm_heads: Callable[..., Any]
    rope: Callable[[tuple[int, int], int, Rotary], Any]
    choose_experts: Callable[[int, int, bool, float], Any]
    plan_experts: Callable[[relax.BlockBuilder, Expr, int, int], list[Expr]]
    expert_linear: Callable[[Weight, int, int, bool], Any]
    weighted_sum: Callable[[int, int], Any]
    softmax: Callable[[relax.BlockBuilder, Expr, Expr], Expr]


def operations(builder: relax.BlockBuilder, dtype: str, make: Factories) -> Operations:
    """Operations that emit into `builder`; `dtype` is the model dtype."""
    compute, emit = make.compute, partial(call, builder)
    plans: dict[tuple[Expr, int, int], list[Expr]] = {}  # of chosen experts: made once for all products with them

    def operand(x: Expr, alone: bool = False) -> Expr:
        shape, given, wanted = list(x.ty.shape), str(x.ty.dtype), make.operand
        if wanted in (None, given):
            return x
        if alone:
            return emit(_cast(int(shape[1]), given, wanted), "cast", [x], shape, wanted)
        return builder.emit(relax.op.astype(x, wanted))

    def linear(x: Expr, weight: Weight, out_dtype: str) -> Expr:
        x = operand(x)
        n, columns = x.ty.shape
        kernel = make.linear(weight, int(columns), str(x.ty.dtype), out_dtype)
        return emit(kernel, "linear", [x, *weight.parts.values()], [n, weight.rows], out_dtype)

    def embedding(ids: Expr, weight: Weight, hidden_size: int) -> Expr:
        kernel = make.embedding(weight, hidden_size)
        return emit(kernel, "embedding", [ids, *weight.parts.values()], [ids.ty.shape[0], hidden_size], dtype)

    def rms_norm(x: Expr, weight: Expr, eps: float) -> Expr:
        return emit(make.rms_norm(int(x.ty.shape[1]), eps), "rms_norm", [x, weight], list(x.ty.shape), compute)

    def layer_norm(x: Expr, weight: Expr | None, bias: Expr | None, eps: float) -> Expr:
        kernel = make.layer_norm(int(x.ty.shape[1]), eps, weight is not None, bias is not None)
        return emit(kernel, "layer_norm", [x, *_present(weight, bias)], list(x.ty.shape), compute)

    def gated(x: Expr, name: str) -> Expr:
        width = int(x.ty.shape[1]) // 2
        return emit(make.gated(name, width), "gated", [x], [x.ty.shape[0], width], compute)

    def activation(x: Expr, name: str) -> Expr:
        return emit(make.activation(name, int(x.ty.shape[1])), "activation", [x], list(x.ty.shape), compute)

    def norm_heads(
        qkv: Expr, weights: tuple[Expr | None, ...], heads: tuple[int, int], spans: str, norm: str, eps: float
    ) -> Expr:
        shapes = tuple(None if each is None else tuple(int(size) for size in each.ty.shape) for each in weights)
        kernel = make.norm_heads(heads, int(qkv.ty.shape[2]), shapes, spans, norm == "layer", eps)
        return emit(kernel, "norm_heads", [qkv, *_present(*weights)], list(qkv.ty.shape), dtype)

    def rope(qkv: Expr, positions: Expr, frequencies: Frequencies, heads: tuple[int, int], rotary: Rotary) -> Expr:
        kernel = make.rope(heads, int(qkv.ty.shape[2]), rotary)
        return emit(kernel, "rope", [qkv, positions, relax.const(frequencies)], list(qkv.ty.shape), dtype)

    def choose_experts(logits: Expr, count: int, normalised: bool, scale: float) -> tuple[Expr, Expr]:
        n, experts = logits.ty.shape
        kernel = make.choose_experts(int(experts), count, normalised, scale)
        results = [([n, count], "int32"), ([n, count], "float32")]
        chosen, share = call_all(builder, kernel, "choose_experts", [logits], results)
        return chosen, share

    def expert_linear(x: Expr, chosen: Expr, weight: Weight) -> Expr:
        (n, count), (rows_of_x, columns) = chosen.ty.shape, x.ty.shape
        each = not sym.Analyzer().can_prove_equal(rows_of_x, n)
        kernel = make.expert_linear(weight, int(columns), int(count), each)
        parts = list(weight.parts.values())
        few = int(kernel.attrs[FEW]) if kernel.attrs is not None and FEW in kernel.attrs else 0
        key = chosen, int(parts[0].ty.shape[0]), few
        if key not in plans:
            plans[key] = make.plan_experts(builder, *key)
        return emit(
            kernel, "experts", [operand(x, alone=each), chosen, *plans[key], *parts], [n * count, weight.rows], compute
        )

    def weighted_sum(x: Expr, share: Expr) -> Expr:
        (n, count), width = share.ty.shape, x.ty.shape[1]
        return emit(make.weighted_sum(int(count), int(width)), "weighted_sum", [x, share], [n, width], compute)

    return Operations(
        compute=compute,
        linear=linear,
        embedding=embedding,
        rms_norm=rms_norm,
        layer_norm=layer_norm,
        gated=gated,
        activation=activation,
        norm_heads=norm_heads,
        rope=rope,
        softmax=partial(make.softmax, builder),
        choose_experts=choose_experts,
        expert_linear=expert_linear,
        weighted_sum=weighted_sum,
    )


@functools.cache
def _cast(width: int, given: str, dtype: str) -> Any:
    """x [n, width] -> x in another dtype, fused with nothing: FuseTIR fails where n is several rows for each token."""
    x = te.placeholder((tirx.Var("n", "int64"), tirx.IntImm("int64", width)), given, "x")
    result = te.compute(x.shape, lambda i, j: x[i, j].astype(dtype), name="cast")
    return te.create_prim_func([x, result]).without_attr("global_symbol").with_attr("op_pattern", 8)


def _present(*given: Expr | None) -> list[Expr]:
    return [each for each in given if each is not None]


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


def rows_of(weight: Weight) -> int | str:
    """How many rows a weight has, as kernels are told it: the vocabulary's number is symbolic, `rows`."""
    return _size(weight.rows)


def parts_of(weight: Weight) -> tuple[Part, ...]:
    return tuple((name, tuple(map(_size, part.ty.shape)), str(part.ty.dtype)) for name, part in weight.parts.items())


def _size(dimension: Expr) -> int | str:
    return "rows" if isinstance(dimension, tirx.Var) else int(dimension)
