"""Parameters that are not a checkpoint's tensors as they are: transposed, with rows in another order, or shifted.

    transpose    [K, N] -> [N, K], as GPT-2's Conv1D keeps its matrices, and Aria each expert's
    ungroup_qkv  rows `q.. k v` of each key-value head -> all queries, all keys, all values
    ungroup_qvk  the same of four groups with rows `q.. v.. k..`, CodeGen's
    latent_keys, latent_values
                 rows of a key and of a value for each head -> a head's keys transposed; its values
    by_expert    all experts' rows in one matrix -> a matrix for each; of two such, each expert's rows joined
    deinterleave of every expert the rows 0, 2, 4 ..., then 1, 3, 5 ...: gpt-oss's gates, then its ups
    evens_first  rows 0, 2, 4 ..., then 1, 3, 5 ...: Zamba's channels, then their gates
    join_heads   [heads, ...] -> the same numbers with the first two axes as one, where it has one axis more
    first_rows, last_rows
                 the rows that the parameter has, of more
    add_one      w -> 1 + w, for norms that are stored as what they differ from 1 (Gemma)
    unit_rows    w -> w / |w| row by row, as Baichuan 2 does with its head in every call
    differential vectors q1, k1, q2, k2 -> exp(q1 · k1) - exp(q2 · k2) + b and 1 - b, b by the layer (arXiv 2410.05258)
    softplus     w -> ln(1 + exp(w)), for numbers that are above 0 (Apertus)
    negative_exp, exp_negative_exp
                 w -> -exp(w) and exp(-exp(w)): the decay of RWKV-4 and RWKV-5, which is trained as w
    times        w -> c * w, the line's number (Dory); square, absolute: w -> w * w and |w|
    halve        w -> w / 2 ** halvings, so that hidden states stay small enough for float16 (RWKV)

What is computed is float32, so that it is rounded once, to the format that it is stored in; halved bfloat16 stays so.

Rows are made a piece at a time, so that memory does not grow with a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.checkpoints.computed import Computed, row_pieces
from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.mapped import FLOATS, view
from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization import floats

Array = npt.NDArray[Any]


def rearranged(parameters: Sequence[Parameter], table: Mapping[str, TensorRef]) -> list[Computed]:
    """Those of the parameters that have something to convert, by their own names.

    The table is known to hold their sources in the right shapes (mlcbuild.checkpoints.index).
    """
    found = []
    for parameter in parameters:
        if parameter.convert:
            refs = [table[source] for source in parameter.sources]
            dtype = _dtype(parameter, refs[0].dtype)
            nbytes = prod(parameter.shape) * FLOATS[dtype][1].itemsize
            target = TensorRef(parameter.name, "", "", Path(), 0, nbytes, dtype, parameter.shape)
            found.append(Computed(target, partial(_rows, parameter, refs)))
    return found


def ungrouped(groups: tuple[int, int, int, int]) -> npt.NDArray[np.int64]:
    """The row of the checkpoint for each row of the parameter: queries of all groups first, then keys, then values."""
    count, *sizes = groups
    rows = np.arange(count * sum(sizes)).reshape(count, -1)
    return np.concatenate([part.ravel() for part in np.split(rows, np.cumsum(sizes)[:-1], axis=1)])


_ARITHMETIC: dict[str, Callable[[Array, Parameter], Array]] = {
    "add_one": lambda values, _: values + np.float32(1),
    "unit_rows": lambda values, _: _unit_rows(values),
    "softplus": lambda values, _: np.logaddexp(values, np.float32(0)),
    "negative_exp": lambda values, _: -np.exp(values),
    "exp_negative_exp": lambda values, _: np.exp(-np.exp(values)),
    "differential": lambda values, parameter: _differential(values, parameter.layer or 0),
    "times": lambda values, parameter: values * np.float32(parameter.times),
    "square": lambda values, _: values * values,
    "absolute": lambda values, _: np.abs(values),
    "halve": lambda values, parameter: values * np.float32(0.5**parameter.halvings),
}


def _unit_rows(wide: Array) -> Array:
    lengths: Array = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    return np.asarray(wide / np.maximum(lengths, np.float32(1e-12)))


def _differential(wide: Array, layer: int) -> Array:
    q1, k1, q2, k2 = np.split(wide, 4)
    start = np.float32(0.8 - 0.6 * np.exp(-0.3 * layer))
    return np.array([np.exp(q1 @ k1) - np.exp(q2 @ k2) + start, 1 - start], np.float32)


def _dtype(parameter: Parameter, source: str) -> str:
    """What the parameter is written as: halves of a bfloat16 are bfloat16s again, where the numbers are not tiny."""
    computed = [name for name in parameter.convert if name in _ARITHMETIC]
    return source if not computed or (computed == ["halve"] and source == "BF16") else "F32"


def _rows(parameter: Parameter, refs: Sequence[TensorRef]) -> Iterator[Array]:
    arrays = [view(ref) for ref in refs]
    if "by_expert" in parameter.convert:
        arrays = [array.reshape(parameter.shape[0], -1, array.shape[1]) for array in arrays]
        for matrices in zip(*arrays, strict=True):
            whole = np.concatenate(matrices)[None]
            yield np.ascontiguousarray(np.swapaxes(whole, -1, -2) if "transpose" in parameter.convert else whole)
        return
    if parameter.role.startswith("latent_"):
        assert parameter.groups is not None
        heads, _, key, _ = parameter.groups
        for rows in arrays[0].reshape(heads, -1, arrays[0].shape[1]):
            yield (np.ascontiguousarray(rows[:key].T) if "latent_keys" in parameter.convert else rows[key:])[None]
        return
    if "differential" in parameter.convert:
        joined = np.concatenate([floats.widen(array, FLOATS[refs[0].dtype][0]) for array in arrays])
        yield _ARITHMETIC["differential"](joined, parameter)
        return
    if "join_heads" in parameter.convert:
        arrays = [array.reshape(parameter.joined(array.shape)) for array in arrays]
    if "transpose" in parameter.convert:
        arrays = [np.swapaxes(array, -1, -2) for array in arrays]
    starts = np.cumsum([0, *(len(array) for array in arrays)])
    order = np.arange(parameter.shape[0])
    if "last_rows" in parameter.convert:
        order += starts[-1] - len(order)
    if "ungroup_qkv" in parameter.convert:
        assert parameter.groups is not None
        order = ungrouped(parameter.groups)
    if "ungroup_qvk" in parameter.convert:
        part = parameter.shape[0] // 12
        queries, rest, keys = np.split(ungrouped((4, part, part, part)), 3)
        order = np.concatenate([queries, keys, rest])
    if "evens_first" in parameter.convert:
        order = np.concatenate([order[0::2], order[1::2]])
    dtype = FLOATS[refs[0].dtype][0]
    for piece in row_pieces(parameter.shape):
        wanted = order[piece]
        values = np.empty((len(wanted), *parameter.shape[1:]), arrays[0].dtype)
        for array, start, end in zip(arrays, starts, starts[1:], strict=False):
            mine = (wanted >= start) & (wanted < end)
            if mine.any():
                values[mine] = array[wanted[mine] - start]
        if "deinterleave" in parameter.convert:
            values = np.concatenate([values[:, 0::2], values[:, 1::2]], axis=1)
        computed = [name for name in parameter.convert if name in _ARITHMETIC]
        for name in computed:
            values = _ARITHMETIC[name](floats.widen(values, dtype), parameter)
        yield floats.cast(values, "float32", FLOATS[_dtype(parameter, refs[0].dtype)][0]) if computed else values
