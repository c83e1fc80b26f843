"""A weights folder as the unquantized parameters it stands for: what a library computes with, for checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization import asymmetric, awq, floats, group, outer
from mlcbuild.quantization.floats import Array, Float32
from mlcbuild.quantization.packing import Packed
from mlcbuild.quantization.schemes import quantized_parameters
from mlcbuild.quantization.tensor_cache import read_tensors
from mlcbuild.recipes.types import Quantization, Weights


def dequantized(
    folder: Path, parameters: Sequence[Parameter], quantization: Quantization
) -> Iterator[tuple[str, Float32]]:
    """(name, values) for each of `parameters`, in order; values are of the model dtype, held as float32.

    Raises MlcBuildError when the folder's tensors are not the ones that the quantization makes of the parameters, and
    as `read_tensors` does.
    """
    made = {each.name: each for each in quantized_parameters(parameters, quantization)}
    parts = Counter(each.source for each in made.values())
    shapes = {parameter.name: parameter.shape for parameter in parameters}
    dtype = quantization.model_dtype
    waiting: dict[str, dict[str, Array]] = {}
    seen = set()
    for name, values in read_tensors(folder):
        each = made.get(name)
        if each is None or values.shape != each.shape:
            expected = f"expected {list(each.shape)}" if each else f"{quantization.name} has no such tensor"
            raise MlcBuildError(f"{folder}: tensor {name} {list(values.shape)}: {expected}")
        seen.add(name)
        if each.weights is None:
            yield each.source, floats.widen(values, each.dtype)
            continue
        tensors = waiting.setdefault(each.source, {})
        tensors[each.form] = values
        if len(tensors) == parts[each.source]:
            yield each.source, unpack(waiting.pop(each.source), shapes[each.source], each.weights, dtype)
    missing = sorted(made.keys() - seen)
    if missing:
        raise MlcBuildError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all)")


def unpack(tensors: Mapping[str, Array], shape: Sequence[int], weights: Weights, model_dtype: str) -> Float32:
    """The parameter, a matrix `[n, k]` or experts `[experts, n, k]`, that its packed tensors stand for.

    They are given by the last word of their names.
    """
    if len(shape) == 2:
        return unpack_matrix(tensors, shape[1], weights, model_dtype)
    experts = ({form: values[e] for form, values in tensors.items()} for e in range(shape[0]))
    return np.stack([unpack_matrix(each, shape[2], weights, model_dtype) for each in experts])


def unpack_matrix(tensors: Mapping[str, Array], k: int, weights: Weights, model_dtype: str) -> Float32:
    """The matrix `[n, k]` of its packed tensors."""
    if weights.scheme == "awq":
        scales = floats.widen(tensors["scales"], model_dtype)
        values = awq.dequantize_awq(tensors["qweight"], tensors["qzeros"], scales)
        return floats.widen(floats.cast(np.ascontiguousarray(values), "float32", model_dtype), model_dtype)
    codes = tensors["q_weight"].T if weights.layout == "KN" else tensors["q_weight"]
    if weights.scheme == "minmax_outer":
        in_scale, out_scale, in_min, out_min = (tensors[name] for name in outer.STORED)
        return outer.decode(codes, in_scale, out_scale, in_min, out_min, model_dtype)
    scales = tensors["q_scale" if weights.symmetric else "q_scale_min"]
    rows = Packed(codes, scales.T if weights.layout == "KN" else scales)
    if weights.symmetric:
        return group.decode(rows, k, weights, model_dtype)
    return asymmetric.decode(rows, k, weights)
