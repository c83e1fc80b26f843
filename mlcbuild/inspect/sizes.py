"""What a model takes in each quantization: bytes of weights, and of the keys and values of one conversation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.kinds import DECODER, HYBRID, by_layer
from mlcbuild.models.parameters import count, parameters
from mlcbuild.models.structure import Structure
from mlcbuild.planning.budgets import MEASURED
from mlcbuild.quantization import budget
from mlcbuild.quantization.schemes import quantized_parameters
from mlcbuild.recipes.types import Quantization

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "uint32": 4, "uint16": 2, "uint8": 1}
CONVERSATION = 4096  # tokens: what overrides usually limit a long context to


@dataclass(frozen=True)
class Size:
    """Bytes of weights, and of keys and values of `tokens`; `problem` says why the model has no such form."""

    weights: int = 0
    cache: int = 0
    tokens: int = 0
    problem: str | None = None

    @property
    def total(self) -> int:
        return self.weights + self.cache


def sizes(structure: Structure, quantizations: Mapping[str, Quantization]) -> dict[str, Size]:
    """By quantization; those that only round otherwise, or mean the bytes of 2023, are left out."""
    plain = {
        name: each for name, each in quantizations.items() if each.format in ("", name) and each.scheme_version > 1
    }
    return {name: size(structure, each) for name, each in plain.items()}


def size(structure: Structure, quantization: Quantization) -> Size:
    """Of the weights (without a shard's padding), and of keys and values of the context, or 4096 tokens of it."""
    if quantization.weights is not None and quantization.weights.scheme == "awq":
        return Size(problem="for checkpoints that AutoAWQ quantized")
    if quantization.formats and structure.embedding is not None:
        return Size(problem="for models that predict tokens")
    if (quantization.formats or quantization.rounding in MEASURED) and not by_layer(structure):
        return Size(problem="for models that run layer by layer")
    try:
        weights = _weights(structure, quantization)
    except MlcBuildError as error:
        return Size(problem=str(error))
    _, kv_heads, width = structure.cache_heads
    per_token = 2 * len(structure.cached) * kv_heads * width
    if structure.kind not in (DECODER, HYBRID):  # a recurrent model's state does not grow, and an encoder keeps nothing
        return Size(weights)
    context = structure.context_window_size
    tokens = min(context, CONVERSATION) if context > 0 else CONVERSATION
    return Size(weights, per_token * tokens * _BYTES[quantization.model_dtype], tokens)


def _weights(structure: Structure, quantization: Quantization) -> int:
    """Bytes. What a budget chooses is not known, but what it has: if it is not more than the largest formats take."""
    known = parameters(structure)
    if quantization.bits_per_weight is None:
        return sum(prod(each.shape) * _BYTES[each.dtype] for each in quantized_parameters(known, quantization))
    bits, numbers = budget.bits(known, quantization), count(structure)
    budget.choose(quantization.bits_per_weight, bits, {kind: of for kind, of in bits.items() if kind}, numbers)
    largest = sum(max(of.values()) for of in bits.values())
    return int(min(quantization.bits_per_weight * numbers, largest) / 8)
