"""Packed weights as TVM expressions: the number that the parts of a matrix stand for at [row, column].

Formulas: docs/quantization.md. Arithmetic is in the model dtype, as in MLC's own kernels; sums over products are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm import te, tirx

from mlcbuild.errors import MlcBuildError
from mlcbuild.quantization.schemes import STORAGE_BITS, elements_per_word, max_code
from mlcbuild.recipes.types import Weights

Element = Callable[[Any, Any], Any]  # (row, column) -> expression of the model dtype


def element(parts: Mapping[str, te.Tensor], weights: Weights | None, dtype: str) -> Element:
    """How to read one number of a matrix `[N, K]`.

    Raises MlcBuildError for a scheme that no GPU kernel reads.
    """
    if weights is None:
        return lambda n, k: parts["weight"][n, k]
    readers = {"group": _group, "minmax_outer": _minmax, "awq": _awq}
    if weights.scheme not in readers:
        raise MlcBuildError(f"quantization scheme {weights.scheme}: GPU libraries read {', '.join(readers)}")
    return readers[weights.scheme](parts, weights, dtype)


def words(weights: Weights | None) -> int:
    """Columns that one storage word holds, where they lie beside each other; else 1."""
    grouped = weights is not None and weights.scheme == "group" and weights.layout == "NK"
    return elements_per_word(weights) if weights is not None and grouped else 1


def _group(parts: Mapping[str, te.Tensor], weights: Weights, dtype: str) -> Element:
    per_word, storage = elements_per_word(weights), weights.storage_dtype
    assert STORAGE_BITS[storage] >= per_word * weights.bits
    mask = tirx.const((1 << weights.bits) - 1, storage)
    transposed = weights.layout == "KN"

    def at(tensor: te.Tensor, n: Any, k: Any) -> Any:
        return tensor[k, n] if transposed else tensor[n, k]

    def code(n: Any, k: Any) -> Any:
        shift = (k % per_word * weights.bits).astype(storage)
        return ((at(parts["q_weight"], n, k // per_word) >> shift) & mask).astype(dtype)

    if weights.symmetric:
        middle = tirx.const(max_code(weights), dtype)
        return lambda n, k: (code(n, k) - middle) * at(parts["q_scale"], n, k // weights.group_size)

    def asymmetric(n: Any, k: Any) -> Any:
        pair = at(parts["q_scale_min"], n, k // weights.group_size)
        scale = tirx.reinterpret("float32", pair << tirx.const(16, "uint32"))
        least = tirx.reinterpret("float32", pair & tirx.const(0xFFFF0000, "uint32"))
        return code(n, k) * scale.astype(dtype) + least.astype(dtype)

    return asymmetric


def _minmax(parts: Mapping[str, te.Tensor], weights: Weights, dtype: str) -> Element:
    def value(n: Any, k: Any) -> Any:
        code = parts["q_weight"][k, n] if weights.layout == "KN" else parts["q_weight"][n, k]
        scaled = (code.astype("float32") + tirx.const(0.5, "float32")) * parts["q_scale_in"][k].astype("float32")
        scaled = scaled * parts["q_scale_out"][n].astype("float32")
        least = parts["q_min_in"][k].astype("float32") + parts["q_min_out"][n].astype("float32")
        return (scaled + least).astype(dtype)

    return value


def _awq(parts: Mapping[str, te.Tensor], weights: Weights, dtype: str) -> Element:
    per_word = elements_per_word(weights)
    mask = tirx.const((1 << weights.bits) - 1, "uint32")

    def code(tensor: te.Tensor, row: Any, n: Any) -> Any:
        # Columns 0 2 4 6 1 3 5 7 of eight lie in a word from the lowest bits up: j at (j / 2 + 4 * (j mod 2)) codes.
        j = n % per_word
        place = (j // 2 + j % 2 * (per_word // 2)) * weights.bits
        return ((tensor[row, n // per_word] >> place.astype("uint32")) & mask).astype(dtype)

    def value(n: Any, k: Any) -> Any:
        group = k // weights.group_size
        steps = code(parts["qweight"], k, n) - code(parts["qzeros"], group, n)
        return steps * parts["scales"][group, n]

    return value
