"""A package's weights by the parameters that they stand for: tensors for a library, numbers for a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization import floats
from mlcbuild.quantization.dequantize import unpack
from mlcbuild.quantization.schemes import QuantizedParameter, quantized_parameters
from mlcbuild.recipes.types import Quantization
from mlcbuild.runtime import weights
from mlcbuild.runtime.library import match
from mlcbuild.verify.pieces import Float32


class Packed:
    """A weights folder whose tensors are `parameters` in `quantization`; mapped."""

    def __init__(self, folder: Path, parameters: Sequence[Parameter], quantization: Quantization) -> None:
        """Raises MlcBuildError where the folder holds other tensors."""
        self._dtype = quantization.model_dtype
        self._records = {record.name: record for record in weights.read_index(folder)}
        made = quantized_parameters(parameters, quantization)
        match(made, self._records.values(), "the model", folder)
        self._made: dict[str, list[QuantizedParameter]] = {}
        for each in made:
            self._made.setdefault(each.source, []).append(each)

    def tensors(self, parameters: Sequence[Parameter]) -> list[Any]:
        """What a library takes for these parameters, in order."""
        made = [each for parameter in parameters for each in self._made[parameter.name]]
        return list(weights.load([self._records[each.name] for each in made]))

    def rows(self, parameter: Parameter, start: int, stop: int) -> Float32:
        """Rows `start` to `stop` of the numbers that the package computes with; multiples of 8.

        Those of experts [experts, N, K] count one after the other; they must be one expert's.
        """
        made = self._made[parameter.name]
        *_, rows, columns = parameter.shape
        expert = start // rows if len(parameter.shape) == 3 else None
        first, end = (start, stop) if expert is None else (start - expert * rows, stop - expert * rows)
        pieces: dict[str, npt.NDArray[Any]] = {each.form: self._cut(each, rows, expert, first, end) for each in made}
        packing = made[0].weights
        if packing is None:
            return floats.widen(pieces["value"], made[0].dtype)
        return unpack(pieces, (rows, columns), packing, self._dtype)

    def _cut(self, made: QuantizedParameter, rows: int, expert: int | None, start: int, stop: int) -> npt.NDArray[Any]:
        """The part of a tensor that belongs to these rows. One word may hold several rows."""
        values = weights.array(self._records[made.name])
        axis = made.rows_axis
        if expert is not None:
            values, axis = values[expert], None if axis is None else axis - 1
        if axis is None:
            return values
        per_row = rows // values.shape[axis]
        span = slice(start // per_row, -(-stop // per_row))
        return values[(slice(None),) * axis + (span,)]
