"""Weights that AutoAWQ or GPTQ packed into 32-bit words, as numbers.

Both keep `[K in, N out]` matrices of unsigned codes, `[groups, N]` zero points and scales: w[n, k] = (code - zero) *
scale. AWQ (casper-hansen/AutoAWQ, version gemm) packs 8 neighbours along N into a word, column j at nibble
j // 2 + 4 * (j % 2). GPTQ packs neighbours along K (zero points: along N) lowest first, and its first checkpoint format
stores zero - 1.
"""

from __future__ import annotations

import numpy as np

from mlcbuild.quantization.floats import Array, Float32

_AWQ_SHIFTS = np.array([4 * (j // 2 + 4 * (j % 2)) for j in range(8)], np.uint32)


def unpack_awq(words: Array) -> Float32:
    """Codes `[rows, 8 * c]` of words `[rows, c]` uint32."""
    codes = words[:, :, None] >> _AWQ_SHIFTS & np.uint32(15)
    return codes.reshape(len(words), -1).astype(np.float32)


def dequantize_awq(qweight: Array, qzeros: Array, scales: Float32) -> Float32:
    """Rows `[n, K]` of qweight `[K, n / 8]`, qzeros `[groups, n / 8]` and scales `[groups, n]`; float32 arithmetic.

    (code - zero) * scale is exact in float32 for 16-bit scales.
    """
    groups, n = scales.shape
    codes = unpack_awq(qweight).reshape(groups, -1, n)
    codes -= unpack_awq(qzeros)[:, None, :]
    codes *= scales[:, None, :]
    return codes.reshape(-1, n).T


def unpack_natural(words: Array, bits: int) -> Float32:
    """Codes `[rows, c * 32 / bits]` of words `[rows, c]` uint32, the first code lowest; some lie in two words."""
    if 32 % bits:
        single = np.unpackbits(words.view(np.uint8).reshape(len(words), -1), axis=1, bitorder="little")
        whole = single[:, : single.shape[1] // bits * bits].reshape(len(words), -1, bits)
        return (whole @ (1 << np.arange(bits))).astype(np.float32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = words[:, :, None] >> shifts & np.uint32((1 << bits) - 1)
    return codes.reshape(len(words), -1).astype(np.float32)


def dequantize_gptq(qweight: Array, zeros: Float32, scales: Float32, group_of: Array, bits: int) -> Float32:
    """Rows `[n, K]` of qweight `[K * bits / 32, n]`; zeros and scales `[groups, n]`; group_of `[K]` (g_idx)."""
    codes = unpack_natural(np.ascontiguousarray(qweight.T), bits).T
    result: Float32 = ((codes - zeros[group_of]) * scales[group_of]).T
    return result
