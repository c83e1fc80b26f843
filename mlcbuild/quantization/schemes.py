"""What a quantization makes of a model's parameters: names, shapes and dtypes, in MLC's order.

The list is what a compiled library declares in its metadata and what `tensor-cache.json` holds, so the two can never
disagree. Nothing here touches a number or imports NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import TABLES, Parameter
from mlcbuild.recipes.types import Quantization, Weights

GroupForm = Literal["q_weight", "q_scale", "q_scale_min"]
OuterForm = Literal["q_scale_in", "q_scale_out", "q_min_in", "q_min_out"]
AwqForm = Literal["qweight", "qzeros", "scales"]
Form = Literal["value"] | GroupForm | OuterForm | AwqForm
STORAGE_BITS = {"uint32": 32, "uint16": 16, "uint8": 8}


@dataclass(frozen=True)
class QuantizedParameter:
    """One tensor of a quantized model.

    `source` names the unquantized parameter it is made from; `form` is `value` for a cast copy, otherwise the last
    word of its name: which part of the packed parameter this is. `weights` is how that parameter was packed, None for a
    cast copy. `rows_axis` is the axis of `shape` along which the parameter's rows N lie, None where it has none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str
    form: Form
    weights: Weights | None = None
    rows_axis: int | None = 0


@dataclass(frozen=True)
class Part:
    """One tensor that a packed matrix becomes."""

    form: Form
    shape: tuple[Any, ...]
    dtype: str
    rows_axis: int | None


def packed(parameter: Parameter, quantization: Quantization) -> Weights | None:
    """How the parameter is packed, or None when it is only cast to the model dtype.

    Packed are matrices: every linear layer (roles ending in `_proj`), and the embeddings and lm_head as the
    quantization says; norms, biases and router gates are cast. The last override whose pattern (`*` and `?` are wild)
    matches the parameter's role, its name, or its name without `.weight` takes precedence. An embedding is looked up by
    row, so its layout is always NK, as is that of experts in groups, which MLC has in no other; the other matrices have
    the quantization's own.
    """
    if len(parameter.shape) < 2:
        return None
    role = parameter.role
    if role in TABLES:
        weights = quantization.weights if quantization.embedding == "quantized" else None
    elif role == "lm_head":
        weights = quantization.weights if quantization.lm_head == "quantized" else None
    elif role.endswith("_proj"):
        weights = quantization.weights
    else:
        return None
    for pattern, other in quantization.overrides:
        if matches(pattern, parameter):
            weights = other
    if weights is not None and weights.scheme == "awq" and role.startswith("latent_"):
        return None  # AutoAWQ packs both halves in one, and words of a transposed matrix are others
    if weights is not None and (role in TABLES or (len(parameter.shape) == 3 and weights.scheme == "group")):
        return replace(weights, layout="NK")
    return weights


def matches(pattern: str, parameter: Parameter) -> bool:
    """Whether an override's pattern means this parameter: by role, by name, or by name without `.weight`."""
    names = (parameter.role, parameter.name, parameter.name.removesuffix(".weight"))
    return any(fnmatchcase(name, pattern) for name in names)


def quantized_parameters(parameters: Sequence[Parameter], quantization: Quantization) -> tuple[QuantizedParameter, ...]:
    """The tensors of the quantized model: `x.weight` stays, or becomes `x.q_weight` and `x.q_scale` (see `parts`).

    Raises MlcBuildError for a format that no kernel here can pack (`check`), for a packed parameter whose name does
    not end in `.weight`, and for one whose shape its format cannot pack.
    """
    check(quantization)
    made: list[QuantizedParameter] = []
    for parameter in parameters:
        weights = packed(parameter, quantization)
        name, shape = parameter.name, parameter.shape
        if weights is None:
            dtype, rows_axis = parameter.dtype or quantization.model_dtype, max(0, len(shape) - 2)
            made.append(QuantizedParameter(name, shape, dtype, name, "value", rows_axis=rows_axis))
            continue
        if not name.endswith(".weight"):
            raise MlcBuildError(f"parameter {name}: the name of a quantized parameter must end in .weight")
        _check_parameter(parameter, weights, quantization)
        prefix = name.removesuffix("weight")
        made += [
            QuantizedParameter(prefix + part.form, part.shape, part.dtype, name, part.form, weights, part.rows_axis)
            for part in parts_of(shape, weights, quantization.model_dtype)
        ]
    return tuple(made)


def parts_of(shape: tuple[int, ...], weights: Weights, model_dtype: str) -> tuple[Part, ...]:
    """The tensors that a parameter becomes: a matrix's `parts`, or those of all experts, one after the other."""
    *experts, n, k = shape
    made = parts(n, k, weights, model_dtype)
    if not experts:
        return made
    return tuple(
        replace(part, shape=(*experts, *part.shape), rows_axis=None if part.rows_axis is None else part.rows_axis + 1)
        for part in made
    )


def parts(n: Any, k: int, weights: Weights, model_dtype: str) -> tuple[Part, ...]:
    """The tensors that an `[n out, k in]` matrix becomes; `n` may be symbolic, except for awq.

    group, symmetric    q_weight [n, words], q_scale [n, groups] of the model dtype; KN: the transposes
    group, asymmetric   q_weight, q_scale_min [n, groups] uint32: scale (low half) and min as bfloat16
    minmax_outer        q_weight [n, k] (KN: [k, n]); q_scale_in [k], q_scale_out [n], q_min_in [k], q_min_out [n]
    awq                 qweight [k, n / 8], qzeros [groups, n / 8], scales [groups, n]: MLC's names
    """
    if weights.scheme == "awq":
        groups, per_word = k // weights.group_size, elements_per_word(weights)
        return (
            Part("qweight", (k, n // per_word), weights.storage_dtype, 1),
            Part("qzeros", (groups, n // per_word), weights.storage_dtype, 1),
            Part("scales", (groups, n), model_dtype, 1),
        )
    if weights.scheme == "minmax_outer":
        transposed = weights.layout == "KN"
        return (
            Part("q_weight", (k, n) if transposed else (n, k), weights.storage_dtype, int(transposed)),
            Part("q_scale_in", (k,), model_dtype, None),
            Part("q_scale_out", (n,), model_dtype, 0),
            Part("q_min_in", (k,), model_dtype, None),
            Part("q_min_out", (n,), model_dtype, 0),
        )
    words, scales = packed_shapes(n, k, weights)
    axis = int(weights.layout == "KN")
    second = Part("q_scale", scales, model_dtype, axis)
    if not weights.symmetric:
        second = Part("q_scale_min", scales, "uint32", axis)
    return Part("q_weight", words, weights.storage_dtype, axis), second


def packed_shapes(n: Any, k: int, weights: Weights) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Shapes of the packed words and the scales of an `[n out, k in]` matrix in groups; `n` may be symbolic.

    NK: `[n, words]` and `[n, groups]`. KN: the transposes. A partial last group is as long as the others.
    """
    groups = -(-k // weights.group_size)
    words = groups * (weights.group_size // elements_per_word(weights))
    return ((words, n), (groups, n)) if weights.layout == "KN" else ((n, words), (n, groups))


def elements_per_word(weights: Weights) -> int:
    """Packed values in one storage word: 8 for 4 bits in uint32, 10 for 3 bits (2 bits of the word stay zero)."""
    return STORAGE_BITS[weights.storage_dtype] // weights.bits


def max_code(weights: Weights) -> int:
    """m of the symmetric formats: a group's largest magnitude is stored as m steps above or below the code m."""
    return (1 << (weights.bits - 1)) - 1


def check(quantization: Quantization) -> None:
    """Raise MlcBuildError, naming the field, when the quantization's numbers do not make a format."""
    where = f"quantization {quantization.name or '(unnamed)'}"
    checked = [("", quantization.weights)]
    checked += [(f"override {pattern!r}: ", weights) for pattern, weights in quantization.overrides]
    for prefix, weights in checked:
        problem = None if weights is None else _problem(weights, quantization.model_dtype)
        if problem:
            raise MlcBuildError(f"{where}: {prefix}{problem}")
    if quantization.rounding not in ("nearest", "mse", "calibrated", "gptq"):
        raise MlcBuildError(f"{where}: rounding {quantization.rounding!r}: expected nearest, mse, calibrated or gptq")
    able, what = (has_feedback, "groups") if quantization.rounding == "gptq" else (searchable, "symmetric groups")
    if quantization.rounding != "nearest" and not any(w and able(w) for _, w in checked):
        raise MlcBuildError(f"{where}: rounding {quantization.rounding!r}: only {what} have a scale to search for")


def searchable(weights: Weights) -> bool:
    """Whether `rounding: mse` and `calibrated` can choose other scales for these weights."""
    return weights.scheme == "group" and weights.symmetric


def has_feedback(weights: Weights) -> bool:
    """Whether `rounding: gptq` can round these weights."""
    return weights.scheme == "group"


def _problem(weights: Weights, model_dtype: str) -> str | None:
    w = weights
    if w.storage_dtype not in STORAGE_BITS:
        return f"storage_dtype {w.storage_dtype!r}: expected uint32, uint16 or uint8"
    if not 2 <= w.bits <= 8:
        return f"bits {w.bits}: expected 2 to 8"
    if w.scale_floor and not searchable(w):
        return "scale_floor: only symmetric groups have one"
    if w.packed_scale_min and (w.scheme != "group" or w.symmetric):
        return "packed_scale_min: only asymmetric groups have one"
    if w.scheme == "minmax_outer":
        if (w.bits, w.storage_dtype, w.group_size, w.layout, w.symmetric) != (8, "uint8", 0, "KN", False):
            return (
                "scheme minmax_outer: expected bits 8, storage_dtype uint8, no group_size, layout KN, symmetric false"
            )
        return None
    if not w.group_size:
        return f"group_size: missing; scheme {w.scheme} has groups"
    if w.scheme == "awq":
        if (w.bits, w.storage_dtype, w.layout, w.symmetric) != (4, "uint32", "KN", False):
            return "scheme awq: expected bits 4, storage_dtype uint32, layout KN, symmetric false"
        return None if model_dtype == "float16" else f"scheme awq: model_dtype {model_dtype}, expected float16"
    per_word = elements_per_word(w)
    if w.group_size < 0 or w.group_size % per_word:
        return (
            f"group_size {w.group_size} is not a multiple of the {per_word} values of "
            f"{w.bits} bits that one {w.storage_dtype} word holds"
        )
    if not w.symmetric and (w.packed_scale_min != "bf16x2" or model_dtype != "float32"):
        return "symmetric: false: needs packed_scale_min bf16x2 and model_dtype float32"
    return None


def _check_parameter(parameter: Parameter, weights: Weights, quantization: Quantization) -> None:
    """Where the format has no partial groups or words, the matrix must be made of whole ones."""
    if parameter.role in TABLES and weights.scheme != "group":
        raise MlcBuildError(
            f"parameter {parameter.name}: an embedding is looked up by row, which scheme {weights.scheme} cannot do; "
            "say `embedding: kept`, or override it with another quantization"
        )
    if weights.scheme == "minmax_outer" or searchable(weights):
        return
    *_, n, k = parameter.shape
    where = f"parameter {parameter.name} {list(parameter.shape)}: {quantization.name or 'the quantization'} needs"
    advice = "choose another quantization, or keep this parameter with `overrides`"
    if k % weights.group_size:
        raise MlcBuildError(f"{where} input columns in whole groups of {weights.group_size}, not {k}; {advice}")
    if weights.scheme == "awq" and n % elements_per_word(weights):
        raise MlcBuildError(f"{where} output rows in whole words of {elements_per_word(weights)}, not {n}; {advice}")
