"""What a quantization makes of a model's parameters: names, shapes and dtypes, in MLC's order.

The list is what a compiled library declares in its metadata and what `tensor-cache.json` holds, so the two can never
disagree. Nothing here touches a number or imports NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import Parameter
from mlcbuild.recipes.types import Quantization, Weights

Form = Literal["value", "q_weight", "q_scale"]


@dataclass(frozen=True)
class QuantizedParameter:
    """One tensor of a quantized model.

    `source` names the unquantized parameter it is made from; `form` is `value` for a cast copy, otherwise which half
    of a packed pair this is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str
    form: Form


def packed(parameter: Parameter, quantization: Quantization) -> Weights | None:
    """How the parameter is packed, or None when it is only cast to the model dtype.

    Packed are matrices: every linear layer (roles ending in `_proj`), and the embedding and lm_head as the
    quantization says. Norms, biases and router gates are cast. An embedding is looked up by row, so its layout is
    always NK; the other matrices have the quantization's own.
    """
    weights = quantization.weights
    if weights is None or len(parameter.shape) != 2:
        return None
    if parameter.role == "embedding":
        return replace(weights, layout="NK") if quantization.embedding == "quantized" else None
    if parameter.role == "lm_head":
        return weights if quantization.lm_head == "quantized" else None
    return weights if parameter.role.endswith("_proj") else None


def quantized_parameters(parameters: Sequence[Parameter], quantization: Quantization) -> tuple[QuantizedParameter, ...]:
    """The tensors of the quantized model: `x.weight` stays, or becomes `x.q_weight` and `x.q_scale`.

    Raises MlcBuildError for a format that no kernel here can pack (`check`), and for a packed parameter whose name
    does not end in `.weight`.
    """
    if quantization.weights is not None:
        check(quantization)
    made: list[QuantizedParameter] = []
    for parameter in parameters:
        weights = packed(parameter, quantization)
        name = parameter.name
        if weights is None:
            made.append(QuantizedParameter(name, parameter.shape, quantization.model_dtype, name, "value"))
            continue
        if not name.endswith(".weight"):
            raise MlcBuildError(f"parameter {name}: the name of a quantized parameter must end in .weight")
        prefix = name.removesuffix("weight")
        words, scales = packed_shapes(parameter.shape[0], parameter.shape[1], weights)
        made.append(QuantizedParameter(f"{prefix}q_weight", words, weights.storage_dtype, name, "q_weight"))
        made.append(QuantizedParameter(f"{prefix}q_scale", scales, quantization.model_dtype, name, "q_scale"))
    return tuple(made)


def packed_shapes(n: Any, k: int, weights: Weights) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Shapes of the packed words and the scales of an `[n out, k in]` matrix; `n` may be symbolic.

    NK: `[n, words]` and `[n, groups]`. KN: the transposes. A partial last group is as long as the others.
    """
    groups = -(-k // weights.group_size)
    words = groups * (weights.group_size // elements_per_word(weights))
    return ((words, n), (groups, n)) if weights.layout == "KN" else ((n, words), (n, groups))


def elements_per_word(weights: Weights) -> int:
    """Packed values in one storage word: 8 for 4 bits in uint32, 10 for 3 bits (2 bits of the word stay zero)."""
    return storage_bits(weights) // weights.bits


def storage_bits(weights: Weights) -> int:
    return {"uint32": 32, "uint16": 16, "uint8": 8}[weights.storage_dtype]


def max_code(weights: Weights) -> int:
    """m of the symmetric formats: a group's largest magnitude is stored as m steps above or below the code m."""
    return (1 << (weights.bits - 1)) - 1


def check(quantization: Quantization) -> None:
    """Raise MlcBuildError, naming the field, when the quantization's numbers do not make a format."""
    weights = quantization.weights
    where = f"quantization {quantization.name or '(unnamed)'}"
    if weights is None:
        return
    if weights.storage_dtype not in ("uint32", "uint16", "uint8"):
        raise MlcBuildError(f"{where}: storage_dtype {weights.storage_dtype!r}: expected uint32, uint16 or uint8")
    if not 2 <= weights.bits <= 8:
        raise MlcBuildError(f"{where}: bits {weights.bits}: expected 2 to 8")
    if weights.group_size <= 0 or weights.group_size % elements_per_word(weights):
        raise MlcBuildError(
            f"{where}: group_size {weights.group_size} is not a multiple of the {elements_per_word(weights)} values of "
            f"{weights.bits} bits that one {weights.storage_dtype} word holds"
        )
    if not weights.symmetric:
        raise MlcBuildError(f"{where}: symmetric: false: asymmetric groups are not supported yet")
    if quantization.rounding != "nearest":
        raise MlcBuildError(f"{where}: rounding {quantization.rounding!r}: only 'nearest' is supported yet")
