"""A weights folder as the unquantized parameters it stands for: what a library computes with, for checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization import floats, group
from mlcbuild.quantization.schemes import packed, quantized_parameters
from mlcbuild.quantization.tensor_cache_reader import read_tensors
from mlcbuild.recipes.types import Quantization


def dequantized(
    folder: Path, parameters: Sequence[Parameter], quantization: Quantization
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """(name, values) for each of `parameters`, in order; values are of the model dtype, held as float32.

    Raises MlcBuildError when the folder's tensors are not the ones that the quantization makes of the parameters, and
    as `read_tensors` does.
    """
    made = {each.name: each for each in quantized_parameters(parameters, quantization)}
    by_name = {parameter.name: parameter for parameter in parameters}
    dtype = quantization.model_dtype
    words: dict[str, npt.NDArray[Any]] = {}
    seen = set()
    for name, values in read_tensors(folder):
        each = made.get(name)
        if each is None or values.shape != each.shape:
            expected = f"expected {list(each.shape)}" if each else f"{quantization.name} has no such tensor"
            raise MlcBuildError(f"{folder}: tensor {name} {list(values.shape)}: {expected}")
        parameter = by_name[each.source]
        weights = packed(parameter, quantization)
        seen.add(name)
        if each.form == "q_weight":
            words[each.source] = values
        elif weights is None:
            yield each.source, floats.widen(values, dtype)
        else:
            pair = words.pop(each.source), values
            rows = group.Packed(*(half.T if weights.layout == "KN" else half for half in pair))
            yield each.source, group.decode(rows, parameter.shape[1], weights, dtype)
    missing = sorted(made.keys() - seen)
    if missing:
        raise MlcBuildError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all)")
