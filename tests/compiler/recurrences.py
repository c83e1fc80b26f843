"""The recurrences of RWKV and Mamba in float64, token by token, for sequences of equal length one after the other."""

from __future__ import annotations

import numpy as np

from tests.support.llama import Array


def wkv4(key: Array, value: Array, decay: Array, bonus: Array, a: Array, b: Array, m: Array) -> tuple[Array, ...]:
    """The sums as they are, without an exponent kept apart: out [n, W], the sums of weighted values and of weights."""
    tokens, out = len(key) // len(a), np.empty(key.shape)
    weighted, weights = (each * np.exp(m.astype(np.float64)) for each in (a, b))
    for t, k in enumerate(key.astype(np.float64)):
        s, now = t // tokens, np.exp(bonus + k)
        out[t] = (weighted[s] + now * value[t]) / (weights[s] + now)
        weighted[s] = weighted[s] * np.exp(decay) + np.exp(k) * value[t]
        weights[s] = weights[s] * np.exp(decay) + np.exp(k)
    return out, weighted, weights


def wkv(r: Array, k: Array, v: Array, decay: Array, bonus: Array, before: Array) -> tuple[Array, Array]:
    """out [n, W] and the states [b, heads, dim, dim] after it; `decay` has one row, or one for each token."""
    sequences, heads, dim, _ = before.shape
    state, out = before.astype(np.float64), np.empty(r.shape)
    for t in range(len(r)):
        s = t // (len(r) // sequences)
        row, column = r[t].reshape(heads, 1, dim), k[t].reshape(heads, 1, dim)
        new = v[t].reshape(heads, dim, 1).astype(np.float64) * column
        out[t] = ((state[s] + bonus.reshape(heads, 1, dim) * new) * row).sum(-1).ravel()
        state[s] = state[s] * decay[t % len(decay)].reshape(heads, 1, dim) + new
    return out, state


def scan(
    x: Array, step: Array, bias: Array, rate: Array, b: Array, c: Array, skip: Array, before: Array,
    limits: tuple[float, float],
) -> tuple[Array, Array]:  # fmt: skip
    """out [n, W] and the states [b, size, W] after it; b and c: [n, groups, size]."""
    width, dim, groups = x.shape[1], x.shape[1] // step.shape[1], b.shape[1]
    steps = np.repeat(np.clip(np.logaddexp(0, step.astype(np.float64) + bias), *limits), dim, axis=1)
    state, out = before.astype(np.float64), np.empty(x.shape)
    for t in range(len(x)):
        s = t // (len(x) // len(before))
        mine_b, mine_c = (np.repeat(each[t].T, width // groups, axis=1) for each in (b, c))
        state[s] = np.exp(steps[t] * (rate if rate.ndim > 1 else np.repeat(rate, dim))) * state[s] + mine_b * (
            steps[t] * x[t]
        )
        out[t] = (state[s] * mine_c).sum(0) + np.repeat(skip, dim) * x[t]
    return out, state
