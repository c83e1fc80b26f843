"""Every weight format packed by NumPy, from the formulas of docs/quantization.md: what kernels are compared with.

Written for these tests, without the code under test. A packed matrix `[N, K]` is its tensors, in the order in which a
library takes them, and the float32 weights that they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.models.parameters import parameters
from mlcbuild.models.structure import Structure
from mlcbuild.quantization.schemes import quantized_parameters
from mlcbuild.recipes.types import Quantization, Weights

Array = npt.NDArray[Any]
_STORAGE = {"uint32": np.uint32, "uint16": np.uint16, "uint8": np.uint8}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbouring columns lies in which four bits, the lowest first


@dataclass(frozen=True)
class Packed:
    parts: tuple[Array, ...]
    values: Array


def rounded(values: Array, dtype: str) -> Array:
    """float32 values that `dtype` has."""
    if dtype != "bfloat16":
        return values.astype(dtype).astype(np.float32)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def stored(values: Array, dtype: str) -> Array:
    """Such values as they lie in memory: bfloat16 as its bits, uint16."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def pack(weight: Array, weights: Weights | None, dtype: str) -> Packed:
    """`weight` [N, K], or experts [E, N, K], float32 in the format `weights`, whose model dtype is `dtype`."""
    if weights is not None and weight.ndim == 3:
        each = [pack(expert, weights, dtype) for expert in weight]
        parts = tuple(np.stack(part) for part in zip(*(one.parts for one in each), strict=True))
        return Packed(parts, np.stack([one.values for one in each]))
    if weights is None:
        values = rounded(weight, dtype)
        return Packed((stored(values, dtype),), values)
    packed = {"group": _group, "awq": _awq, "minmax_outer": _minmax}[weights.scheme](weight, weights, dtype)
    return Packed(tuple(map(np.ascontiguousarray, packed.parts)), packed.values)


def pack_model(
    structure: Structure, quantization: Quantization, values: Mapping[str, Array]
) -> tuple[list[tuple[Array, str]], dict[str, Array]]:
    """(array, dtype) of a library's parameters in its order, and the float32 parameters that they stand for."""
    dtype = quantization.model_dtype
    made = quantized_parameters(parameters(structure), quantization)
    formats = {each.source: each.weights for each in made}
    packed = {source: pack(values[source], weights, dtype) for source, weights in formats.items()}
    arrays = [array for source in formats for array in packed[source].parts]
    given = [(array, each.dtype) for array, each in zip(arrays, made, strict=True)]
    return given, {source: each.values for source, each in packed.items()}


def _group(weight: Array, weights: Weights, dtype: str) -> Packed:
    n, k = weight.shape
    size = weights.group_size
    assert size
    padded = np.zeros((n, -(-k // size) * size), np.float32)
    padded[:, :k] = weight
    grouped = padded.reshape(n, -1, size)
    if weights.symmetric:
        zero = (1 << (weights.bits - 1)) - 1
        scale = rounded(np.abs(grouped).max(-1) / zero, dtype)
        codes = np.round(grouped / np.maximum(scale, 1e-9)[..., None] + zero).clip(0, 2 * zero).astype(np.int64)
        values = (codes - zero) * scale[..., None]
        second = stored(scale, dtype)
    else:
        low = rounded(grouped.min(-1), "bfloat16")
        scale = rounded((grouped.max(-1) - low) / 15, "bfloat16")
        codes = np.round((grouped - low[..., None]) / scale[..., None]).clip(0, 15).astype(np.int64)
        values = codes * scale[..., None] + low[..., None]
        halves = [stored(half, "bfloat16").astype(np.uint32) for half in (scale, low)]
        second = halves[0] | halves[1] << np.uint32(16)
    words = _words(codes.reshape(n, -1), weights.bits, weights.storage_dtype)
    parts = (words, second) if weights.layout == "NK" else (words.T, second.T)
    return Packed(parts, values.reshape(n, -1)[:, :k].astype(np.float32))


def _words(codes: Array, bits: int, storage: str) -> Array:
    dtype = _STORAGE[storage]
    per_word = np.dtype(dtype).itemsize * 8 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // per_word), np.uint64)
    for j in range(per_word):
        words |= codes[:, j::per_word].astype(np.uint64) << np.uint64(bits * j)
    return words.astype(dtype)


def _awq(weight: Array, weights: Weights, dtype: str) -> Packed:
    n, k = weight.shape
    assert weights.group_size
    grouped = weight.T.reshape(-1, weights.group_size, n)  # [groups, size, n]
    low, high = grouped.min(1), grouped.max(1)
    scale = rounded((high - low) / 15, dtype)
    zero = np.round(-low / scale).clip(0, 15).astype(np.int64)
    codes = np.round(grouped / scale[:, None] + zero[:, None]).clip(0, 15).astype(np.int64)
    values = ((codes - zero[:, None]) * scale[:, None]).reshape(k, n).T
    parts = _awq_words(codes.reshape(k, n)), _awq_words(zero), stored(scale, dtype)
    return Packed(parts, np.ascontiguousarray(values, np.float32))


def _awq_words(codes: Array) -> Array:
    eights = codes.reshape(len(codes), -1, 8).astype(np.uint32)
    words = np.zeros(eights.shape[:2], np.uint32)
    for place, column in enumerate(_AWQ_ORDER):
        words |= eights[:, :, column] << np.uint32(4 * place)
    return words


def _minmax(weight: Array, weights: Weights, dtype: str) -> Packed:
    """Any minima and scales will do here: how good they are is not what is tested."""
    min_in, min_out = (rounded(weight.min(axis) / 2, dtype) for axis in (0, 1))
    rest = weight - min_in - min_out[:, None]
    scale_in = rounded(np.abs(rest).max(0) ** 0.5 / 16, dtype)
    scale_out = rounded(np.abs(rest / scale_in).max(1) / 256, dtype)
    codes = np.floor(rest / (scale_in * scale_out[:, None])).clip(0, 255)
    values = (codes + 0.5) * scale_in * scale_out[:, None] + min_in + min_out[:, None]
    arrays = [stored(part, dtype) for part in (scale_in, scale_out, min_in, min_out)]
    return Packed((codes.astype(np.uint8).T, *arrays), values.astype(np.float32))
