"""float16, bfloat16 and float32 values as NumPy holds them, and exact casts between the three.

NumPy has no bfloat16: such values are held as their bit patterns, uint16. Casts round half to even, as IEEE 754 and
every runtime do; a 16-bit source has only 65,536 values, so its casts are table look-ups, several times faster than
NumPy's own float16 arithmetic.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

STORAGE: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "float32": np.dtype(np.float32),
}

# The smallest magnitude, as the source's bits without its sign, that is not finite in the target: NaN, Inf, or a
# value that rounds to Inf (65520 for float16: halfway between its largest value, 65504, and the next step).
_FIRST_BAD = {
    ("float16", "float16"): 0x7C00,
    ("float16", "bfloat16"): 0x7C00,
    ("float16", "float32"): 0x7C00,
    ("bfloat16", "float16"): 0x4780,
    ("bfloat16", "bfloat16"): 0x7F80,
    ("bfloat16", "float32"): 0x7F80,
    ("float32", "float16"): 0x477FF000,
    ("float32", "bfloat16"): 0x7F7F8000,
    ("float32", "float32"): 0x7F800000,
}


def widen(values: Array, dtype: str) -> npt.NDArray[np.float32]:
    """Values of `dtype` (held as STORAGE says) as float32; nothing is rounded."""
    if dtype == "bfloat16":
        bits = values.astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
    if dtype == "float16":
        return _float16_to_float32().take(values.view(np.uint16), mode="clip")
    return values


def cast(values: Array, source: str, target: str) -> Array:
    """Values of dtype `source` rounded to `target`, both held as STORAGE says.

    A value too large for the target becomes Inf, a NaN stays some NaN (`first_bad` finds both).
    """
    if source == target:
        return values
    if target == "float32":
        return widen(values, source)
    if source == "float32":
        return _narrow(values, target)
    return _between_halves(source, target).take(values.view(np.uint16), mode="clip")


def first_bad(values: Array, source: str, target: str) -> int | None:
    """The flat index of the first value that is NaN or Inf, or becomes Inf in `target`; None when there is none."""
    unsigned = np.uint32 if source == "float32" else np.uint16
    magnitude = np.bitwise_and(values.reshape(-1).view(unsigned), unsigned(np.iinfo(unsigned).max >> 1))
    limit = unsigned(_FIRST_BAD[source, target])
    if magnitude.size == 0 or magnitude.max() < limit:
        return None
    return int(np.argmax(magnitude >= limit))


class BadValue(Exception):
    """A source value is NaN or Inf, or too large for `dtype`. `index` is its flat index in the given values."""

    def __init__(self, index: int, dtype: str) -> None:
        super().__init__(index, dtype)
        self.index = index
        self.dtype = dtype


def check(values: Array, source: str, target: str) -> None:
    """Raise BadValue for what `first_bad` finds."""
    bad = first_bad(values, source, target)
    if bad is not None:
        raise BadValue(bad, target)


def is_bfloat16(values: npt.NDArray[np.float32]) -> bool:
    """Whether the low 16 bits of every value are zero: such values survive a trip through bfloat16."""
    halves = values.reshape(-1).view(np.uint16)
    return not halves[0::2].any()  # little-endian: the low half comes first


def _narrow(values: npt.NDArray[np.float32], target: str) -> Array:
    if target == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = values.view(np.uint32)
    rounded = (bits >> np.uint32(16)) & np.uint32(1)  # half to even: a tie goes up only from an odd value
    rounded += bits
    rounded += np.uint32(0x7FFF)
    rounded >>= np.uint32(16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = 0x7FC0  # a NaN of all ones would have carried into the sign
    return rounded.astype(np.uint16)


@functools.cache
def _float16_to_float32() -> npt.NDArray[np.float32]:
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


@functools.cache
def _between_halves(source: str, target: str) -> Array:
    every = np.arange(1 << 16, dtype=np.uint16).view(STORAGE[source])
    with np.errstate(invalid="ignore"):
        return _narrow(widen(every, source), target)
