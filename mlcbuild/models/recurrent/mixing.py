"""Elementwise pieces of recurrent models, as TE: each becomes one loop on any device.

`n` tokens are those of `b` sequences of equal length, t = n / b tokens each, one sequence after the other. Parameters
come in the shapes of the checkpoints, [1, 1, H] and the like; all arithmetic is in float32.
"""

from __future__ import annotations

from tvm import te, tirx


def interpolated(x: te.Tensor, last: te.Tensor, mu: te.Tensor) -> te.Tensor:
    """x mu + before (1 - mu) [n, H], where `before` is the token before, or `last` [b, H] for the first one."""

    def value(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
        m = mu[0, 0, j].astype("float32")
        return x[i, j] * m + _before(x, last, i, j) * (1 - m)

    return te.compute(x.shape, value, name="interpolated")


def difference(x: te.Tensor, last: te.Tensor) -> te.Tensor:
    """before - x [n, H]"""
    return te.compute(x.shape, lambda i, j: _before(x, last, i, j) - x[i, j], name="difference")


def moved(x: te.Tensor, dx: te.Tensor, mu: te.Tensor) -> te.Tensor:
    """x + dx mu [n, H]"""
    return te.compute(x.shape, lambda i, j: x[i, j] + dx[i, j] * mu[0, 0, j].astype("float32"), name="moved")


def moved_by(x: te.Tensor, dx: te.Tensor, mu: te.Tensor, more: te.Tensor, part: int) -> te.Tensor:
    """x + dx (mu + more[part]) [n, H]; more: [parts, n, H]"""

    def value(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
        return x[i, j] + dx[i, j] * (mu[0, 0, j].astype("float32") + more[part, i, j])

    return te.compute(x.shape, value, name="moved")


def last_rows(x: te.Tensor, last: te.Tensor) -> te.Tensor:
    """Each sequence's last token [b, H]; `last` is only asked for its shape."""
    tokens = x.shape[0] // last.shape[0]
    return te.compute(last.shape, lambda i, j: x[(i + 1) * tokens - 1, j], name="last_rows")


def before(x: te.Tensor, last: te.Tensor) -> te.Tensor:
    """Each token's [n, H] before it, or `last` [b, H] for the first one."""
    return te.compute(x.shape, lambda i, j: _before(x, last, i, j), name="before")


def earlier(x: te.Tensor, kept: te.Tensor, i: tirx.Var, j: tirx.Var, back: tirx.Expr) -> tirx.Expr:
    """x[i - back, j] of x [n, C]; what comes before its sequence is in `kept` [b, tokens * C], the oldest first."""
    tokens, memory = x.shape[0] // kept.shape[0], kept.shape[1] // x.shape[1]
    place = (memory + i % tokens - back) * x.shape[1] + j
    return tirx.if_then_else(i % tokens >= back, x[i - back, j], kept[i // tokens, place])


def last_kept(x: te.Tensor, kept: te.Tensor) -> te.Tensor:
    """`kept` [b, tokens * C] after the tokens of x [n, C]."""
    tokens, width = x.shape[0] // kept.shape[0], x.shape[1]
    memory = kept.shape[1] // width

    def value(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
        row = tokens + j // width  # of what was kept and then of x, without the oldest
        new = x[i * tokens + row - memory, j % width]
        return tirx.if_then_else(row >= memory, new, kept[i, row * width + j % width])

    return te.compute(kept.shape, value, name="last_kept")


def decay(base: te.Tensor, change: te.Tensor) -> te.Tensor:
    """exp(-exp(base + change)) [n, A]; base: [1, 1, A], change: [1, n, A]"""

    def value(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
        return te.exp(-te.exp(base[0, 0, j].astype("float32") + change[0, i, j]))

    return te.compute(change.shape[1:], value, name="decay")


def scaled_and_gated(x: te.Tensor, weight: te.Tensor, bias: te.Tensor, gate: te.Tensor) -> te.Tensor:
    """(x weight + bias) silu(gate) [n, A]"""

    def value(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
        y = x[i, j] * weight[j].astype("float32") + bias[j].astype("float32")
        return y * gate[i, j] * te.sigmoid(gate[i, j])

    return te.compute(x.shape, value, name="scaled_and_gated")


def gated(x: te.Tensor, gate: te.Tensor) -> te.Tensor:
    """x silu(gate) [n, A]"""
    return te.compute(x.shape, lambda i, j: x[i, j] * gate[i, j] * te.sigmoid(gate[i, j]), name="gated")


def scaled(x: te.Tensor, weight: te.Tensor) -> te.Tensor:
    """x weight [n, A]"""
    return te.compute(x.shape, lambda i, j: x[i, j] * weight[j].astype("float32"), name="scaled")


def softplus(x: tirx.Expr) -> tirx.Expr:
    """log(1 + exp(x)), as kernels/state_space.c has it: exact where exp(x) is small, too."""
    u = te.exp(-tirx.abs(x))
    s = u / (u + 2)
    q, total = s * s, tirx.const(1 / 15, "float32")
    for power in (13, 11, 9, 7, 5, 3, 1):
        total = total * q + tirx.const(1 / power, "float32")
    return tirx.max(x, tirx.const(0, "float32")) + 2 * s * total


def received(receptance: te.Tensor, x: te.Tensor) -> te.Tensor:
    """sigmoid(receptance) x [n, A]"""
    return te.compute(x.shape, lambda i, j: te.sigmoid(receptance[i, j]) * x[i, j], name="received")


def squared_relu(x: te.Tensor) -> te.Tensor:
    def value(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
        positive = tirx.max(x[i, j], tirx.const(0, "float32"))
        return positive * positive

    return te.compute(x.shape, value, name="squared_relu")


def _before(x: te.Tensor, last: te.Tensor, i: tirx.Var, j: tirx.Var) -> tirx.Expr:
    tokens = x.shape[0] // last.shape[0]
    return tirx.if_then_else(i % tokens == 0, last[i // tokens, j], x[i - 1, j])
