"""Base + delta: a checkpoint published as the difference to another one, tensor by tensor.

The sum is formed in float32 and rounded once to the delta's dtype, which is what the publishers' scripts give (they
add in float16; float32 holds the exact sum of two such values, or one that rounds to the same). Where the delta's
vocabulary is larger, the base's embedding and output matrix go on with zeros: the delta then holds those rows whole
(lm-sys/FastChat, fastchat/model/apply_delta.py, and its earlier form for Vicuna v0).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.checkpoints.computed import Computed, row_pieces
from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.index import index
from mlcbuild.checkpoints.mapped import FLOATS, view
from mlcbuild.errors import CheckpointError
from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization import floats

_VOCABULARY = ("embedding", "lm_head")  # roles whose rows are tokens


def merged(
    parameters: Sequence[Parameter],
    delta: Mapping[str, TensorRef],
    base: Mapping[str, TensorRef],
    ignored: Collection[str],
) -> list[Computed]:
    """Every tensor of the model as base + delta. `delta` is known to be whole (`index` has been made of it).

    Raises CheckpointError, each line with `delta_of` in front, when the base lacks a tensor, has one too many, or one
    of another shape; more tokens in the base than in the delta are another shape.
    """
    problems: list[str] = []
    fitted = [_fitted(parameter, base, problems) for parameter in parameters]
    if not problems:
        try:
            index(fitted, base, ignored)
        except CheckpointError as error:
            problems = str(error).splitlines()
    if problems:
        raise CheckpointError("\n".join(f"delta_of: {problem}" for problem in problems))
    names = dict.fromkeys(source for parameter in parameters for source in parameter.sources)
    return [Computed(delta[name], partial(_sums, delta[name], base[name])) for name in names]


def _fitted(parameter: Parameter, base: Mapping[str, TensorRef], problems: list[str]) -> Parameter:
    """The parameter as the base has it: with fewer rows, if those are tokens."""
    ref = base.get(parameter.sources[0])
    if parameter.role not in _VOCABULARY or len(parameter.sources) > 1 or ref is None or not ref.shape:
        return parameter
    if ref.shape[0] > parameter.shape[0]:
        problems.append(
            f"{ref.file}: tensor {ref.name}: {ref.shape[0]} tokens, but the delta has {parameter.shape[0]}: "
            "it was made from another base"
        )
    return replace(parameter, shape=(min(ref.shape[0], parameter.shape[0]), *parameter.shape[1:]))


def _sums(delta: TensorRef, base: TensorRef) -> Iterator[npt.NDArray[Any]]:
    """`delta + base` in delta's dtype; rows that the base does not have are delta's."""
    differences, originals = view(delta), view(base)
    dtype, base_dtype = FLOATS[delta.dtype][0], FLOATS[base.dtype][0]
    for rows in row_pieces(delta.shape):
        total = np.array(floats.widen(np.ascontiguousarray(differences[rows]), dtype))
        part = originals[rows]  # shorter, or empty, behind the base's last row
        total[: len(part)] += floats.widen(np.ascontiguousarray(part), base_dtype)
        yield floats.cast(total, "float32", dtype)
