"""Where a matrix is moved to before it is rounded, so that it makes good what was rounded before it.

A matrix W [N, K] is given z where the unquantized model gives it x. W + W S H^-1 comes closest to W x, with H the sum
of z z^T and S that of (x - z) z^T; that is GPTAQ's target (arXiv 2504.02692). It fits the text as well. So the text is
halved, and what one half asks for, with more and less damping, is tried on the other: a part p of a correction C takes
2 p <C, W S> - p^2 <C H, C> off the squared error there. The damping that takes most off both halves, and the best part
with it, at most all, are used with the whole text.
"""

from __future__ import annotations

import numpy as np

from mlcbuild.quantization.feedback import PANEL, Gram, Kernels, damped, mirrored
from mlcbuild.quantization.floats import Float32

_DAMPINGS = (0.003, 0.03, 0.3)
_TRIED = 256  # rows of a matrix by which they are chosen


def moved(kernels: Kernels, rows: Float32, halves: tuple[Gram, Gram]) -> Float32:
    """`rows` [N, K] float32 with the correction; the same where a half of the text is empty."""
    tried = rows[:: -(-len(rows) // _TRIED)]
    wanted = [_wanted(kernels, tried, half) for half in halves]
    best = (0.0, 0.0, 0.0)
    for damping in _DAMPINGS:
        along = across = 0.0
        for one, other in ((0, 1), (1, 0)):
            found = _solved(kernels, halves[one].sums, wanted[one], damping)
            costs = np.zeros_like(found)
            kernels.add_products(costs, mirrored(halves[other].sums), found)
            along += float((found * wanted[other]).sum(dtype=np.float64))
            across += float((found * costs).sum(dtype=np.float64))
        if along > 0 and across > 0:
            best = max(best, (along**2 / across, damping, min(1.0, along / across)))
    _, damping, part = best
    if not part or not all(half.tokens for half in halves):
        return rows
    both = _wanted(kernels, rows, halves[0]) + _wanted(kernels, rows, halves[1])
    found = _solved(kernels, halves[0].sums + halves[1].sums, both, damping)
    return rows + np.float32(round(part, 2)) * found[: rows.shape[1], : len(rows)].T


def _wanted(kernels: Kernels, rows: Float32, half: Gram) -> Float32:
    """(W S)^T, filled up with zeros to multiples of 16."""
    turned = np.zeros((len(half.sums), -(-len(rows) // 16) * 16), np.float32)
    turned[: rows.shape[1], : len(rows)] = rows.T
    found = np.zeros_like(turned)
    kernels.add_products(found, half.shift, turned)
    return found


def _solved(kernels: Kernels, gram: Float32, wanted: Float32, damping: float) -> Float32:
    """H^-1 `wanted`, H with its damping: by its triangle and, from the last panel to the first, back."""
    h, added = damped(gram, damping)
    size = len(h)
    r = kernels.triangle(np.concatenate([h, wanted], axis=1), added)
    found, turned = r[:, size:].copy(), np.ascontiguousarray(r[:, :size].T)
    for a in reversed(range(0, size, PANEL)):
        b = min(a + PANEL, size)
        kernels.add_products(found[a:b], turned[b:, a:b], found[b:], -1.0)
        panel = np.concatenate([np.zeros((b - a, b - a), np.float32), np.eye(b - a, dtype=np.float32)], axis=1)
        kernels.add_products(panel[:, : b - a], r[a:b, a:b], r[a:b, a:b])
        rest, found[a:b] = found[a:b].copy(), 0
        kernels.add_products(found[a:b], kernels.triangle(panel, added)[:, b - a :], rest)
    return found
