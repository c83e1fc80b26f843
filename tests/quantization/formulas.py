"""The formats of docs/quantization.md worked out one element at a time: what the kernels must write, bit for bit.

Nothing here is shared with the code under test. NumPy's float16 and float32 scalars, and ml_dtypes' bfloat16, round
after every operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def scalar(dtype: str) -> Any:
    """The scalar type of a dtype by name."""
    if dtype == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return getattr(np, dtype)


def bits_of(values: Array) -> Array:
    """bfloat16 as the uint16 that the project holds it as."""
    return values.view(np.uint16) if values.dtype.itemsize == 2 and values.dtype.kind not in "fu" else values


@dataclass(frozen=True)
class Symmetric:
    bits: int
    group: int
    word_bits: int
    model_dtype: str
    floor: float = 0.0

    def rows(self, w: Array) -> tuple[Array, Array]:
        """Words `[N, words]` and scales `[N, groups]` of w `[N, K]` float32."""
        t = scalar(self.model_dtype)
        m = t(2 ** (self.bits - 1) - 1)
        per_word = self.word_bits // self.bits
        groups = -(-w.shape[1] // self.group)
        words = [[0] * (groups * self.group // per_word) for _ in w]
        scales = np.zeros((len(w), groups), t)
        with np.errstate(all="ignore"):
            for n, row in enumerate(w):
                for g in range(groups):
                    values = [t(value) for value in row[g * self.group : (g + 1) * self.group]]
                    largest = max([abs(value) for value in values] + ([t(self.floor)] if self.floor else []))
                    scale = scales[n, g] = t(largest / m)
                    for position, value in enumerate(values):
                        code = np.rint(t(t(value / scale) + m).astype(np.float32))
                        code = 0 if np.isnan(code) else int(min(max(code, 0), 2 * int(m)))
                        k = g * self.group + position
                        words[n][k // per_word] |= code << (k % per_word * self.bits)
        return np.array(words, f"uint{self.word_bits}"), bits_of(scales)


def asymmetric(w: Array) -> tuple[Array, Array]:
    """q4f32_0: words `[N, K / 8]` and pairs `[N, K / 32]` of w `[N, K]`, all uint32."""
    bfloat16, f = scalar("bfloat16"), np.float32
    words = [[0] * (w.shape[1] // 8) for _ in w]
    pairs = [[0] * (w.shape[1] // 32) for _ in w]
    with np.errstate(all="ignore"):
        for n, row in enumerate(w.astype(np.float32)):
            for g in range(len(row) // 32):
                values = row[g * 32 : g * 32 + 32]
                least, most = min(values), max(values)
                scale = f(f(most - least) / f(15))
                stored = np.array([scale, least], np.float32).astype(bfloat16).view(np.uint16)
                pairs[n][g] = int(stored[0]) | int(stored[1]) << 16
                for position, value in enumerate(values):
                    quotient = f(f(value - least) / scale)
                    code = 0 if np.isnan(quotient) else int(min(max(np.rint(quotient), 0), 15))
                    k = g * 32 + position
                    words[n][k // 8] |= code << (k % 8 * 4)
    return np.array(words, np.uint32), np.array(pairs, np.uint32)


def outer(w: Array) -> tuple[Array, ...]:
    """q8f16_0: codes `[N, K]` uint8; scale_in, scale_out, min_in, min_out float16, as ChatRWKV makes them of w.T."""
    w = w.astype(np.float32)
    n, k = w.shape
    min_in, min_out = np.zeros(k, np.float32), np.zeros(n, np.float32)
    u = w.copy()
    for side in ("in", "out") if k > n else ("out", "in"):
        for i in range(k if side == "in" else n):
            line = u[:, i] if side == "in" else u[i]
            least = min(line)
            line -= least
            (min_in if side == "in" else min_out)[i] = least
    max_out = np.array([max(row) for row in u], np.float32)
    for i in range(n):
        u[i] = [value / max_out[i] if max_out[i] else 0 for value in u[i]]
    max_in = np.array([max(column) for column in u.T], np.float32)
    for j in range(k):
        u[:, j] = [value / max_in[j] if max_in[j] else 0 for value in u[:, j]]
    codes = np.array([[min(max(int(value * np.float32(256)), 0), 255) for value in row] for row in u], np.uint8)
    scales = ((each / 16).astype(np.float16) for each in (max_in, max_out))
    return codes, *scales, min_in.astype(np.float16), min_out.astype(np.float16)


def pack_awq(codes: Array) -> Array:
    """AutoAWQ's words `[rows, c / 8]` uint32 of codes `[rows, c]`: its order of 8 columns, the first lowest."""
    words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words
