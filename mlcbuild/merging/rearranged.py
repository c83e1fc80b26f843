"""Parameters that are not a checkpoint's tensors as they are: transposed, with rows in another order, or shifted.

    transpose    [K, N] -> [N, K], as GPT-2's Conv1D keeps its matrices
    ungroup_qkv  rows `q.. k v` of each key-value head -> all queries, all keys, all values
    add_one      w -> 1 + w, for norms that are stored as what they differ from 1 (Gemma); float32, so that the sum is
                 rounded once, to the format that it is stored in
    unit_rows    w -> w / |w| row by row, as Baichuan 2 does with its head in every call; float32 too

Rows are made a piece at a time, so that memory does not grow with a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.made import Made, row_pieces, view
from mlcbuild.checkpoints.mapped import FLOATS
from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization import floats

Array = npt.NDArray[Any]


def rearranged(parameters: Sequence[Parameter], table: Mapping[str, TensorRef]) -> list[Made]:
    """Those of the parameters that have something to convert, by their own names.

    The table is known to hold their sources in the right shapes (mlcbuild.checkpoints.index).
    """
    found = []
    for parameter in parameters:
        if parameter.convert:
            refs = [table[source] for source in parameter.sources]
            dtype = "F32" if {"add_one", "unit_rows"} & set(parameter.convert) else refs[0].dtype
            nbytes = prod(parameter.shape) * FLOATS[dtype][1].itemsize
            target = TensorRef(parameter.name, "", "", Path(), 0, nbytes, dtype, parameter.shape)
            found.append(Made(target, partial(_rows, parameter, refs)))
    return found


def ungrouped(groups: tuple[int, int, int, int]) -> npt.NDArray[np.int64]:
    """The row of the checkpoint for each row of the parameter: queries of all groups first, then keys, then values."""
    count, *sizes = groups
    rows = np.arange(count * sum(sizes)).reshape(count, -1)
    return np.concatenate([part.ravel() for part in np.split(rows, np.cumsum(sizes)[:-1], axis=1)])


def _rows(parameter: Parameter, refs: Sequence[TensorRef]) -> Iterator[Array]:
    arrays = [view(ref) for ref in refs]
    if "transpose" in parameter.convert:
        arrays = [array.T for array in arrays]
    starts = np.cumsum([0, *(len(array) for array in arrays)])
    order = np.arange(parameter.shape[0])
    if "ungroup_qkv" in parameter.convert:
        assert parameter.groups is not None
        order = ungrouped(parameter.groups)
    dtype = FLOATS[refs[0].dtype][0]
    for piece in row_pieces(parameter.shape):
        wanted = order[piece]
        values = np.empty((len(wanted), *parameter.shape[1:]), arrays[0].dtype)
        for array, start, end in zip(arrays, starts, starts[1:], strict=False):
            mine = (wanted >= start) & (wanted < end)
            if mine.any():
                values[mine] = array[wanted[mine] - start]
        if "add_one" in parameter.convert:
            values = floats.widen(values, dtype) + np.float32(1)
        elif "unit_rows" in parameter.convert:
            wide = floats.widen(values, dtype)
            values = wide / np.maximum(np.sqrt((wide * wide).sum(axis=1, keepdims=True)), np.float32(1e-12))
        yield values
