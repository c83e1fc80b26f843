"""The recurrences of RWKV, Mamba, delta nets, xLSTM and Griffin in float64, token by token.

Sequences are of equal length, one after the other.
"""

from __future__ import annotations

import numpy as np

from tests.support.llama import Array

LENGTHS = (1, 2, 11, 12, 13, 31, 32, 33, 64, 65, 130)  # around what a kernel takes at once
Delta = tuple[Array, Array, Array, Array]  # x, decays, beta and states
Scan = tuple[Array, Array, Array, Array, Array, Array, Array, Array]  # x, steps, biases, rates, b, c, skips, states
EXTREMES = np.array([0, 1e-38, 1e-20, 1e-3, 0.9, 1 - 2**-24, 1], np.float32)  # decays


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


def scan_inputs(sequences: int, tokens: int, heads: int, dim: int, groups: int, size: int, each: bool) -> Scan:
    """As `scan` takes them, but for its limits."""
    random, n = np.random.default_rng(0), sequences * tokens
    x, step, bias = random.normal(size=(n, heads * dim)), 9 * random.normal(size=(n, heads)), random.normal(size=heads)
    rate = -np.exp(random.uniform(-20, 5, size=(*([size] if each else []), heads)))
    b, c = (random.normal(size=(n, groups, size)) for _ in range(2))
    skip, before = random.normal(size=heads), random.normal(size=(sequences, size, heads * dim))
    f = np.float32
    inputs = x.astype(f), step.astype(f), bias.astype(f), rate.astype(f)
    return *inputs, b.astype(f), c.astype(f), skip.astype(f), before.astype(f)


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


def delta_inputs(sequences: int, tokens: int, heads: int, groups: int, keys: int, dim: int, each: bool) -> Delta:
    """As `delta` takes them."""
    random, n = np.random.default_rng(0), sequences * tokens
    x, state = (
        random.normal(size=(n, 2 * groups * keys + heads * dim)),
        random.normal(size=(sequences, heads, keys, dim)),
    )
    decay = np.exp(-np.abs(random.normal(size=(n, heads, keys if each else 1))))
    beta = 1 / (1 + np.exp(random.normal(size=(n, heads))))
    f = np.float32
    return x.astype(f), decay.astype(f), beta.astype(f), state.astype(f)


def delta(x: Array, decay: Array, beta: Array, before: Array, groups: int) -> tuple[Array, Array]:
    """out [n, heads * dim] and the states [b, heads, keys, dim] after it; decay: [n, heads, keys or 1]."""
    sequences, heads, keys, dim = before.shape
    q, k, v = np.split(x.astype(np.float64), [groups * keys, 2 * groups * keys], axis=1)
    q, k = (
        each / np.sqrt((each**2).sum(2, keepdims=True) + 1e-6) for each in (a.reshape(-1, groups, keys) for a in (q, k))
    )
    out, state = np.empty((len(x), heads * dim)), before.astype(np.float64)
    for t in range(len(x)):
        for h in range(heads):
            held, key = state[t // (len(x) // sequences), h], k[t, h * groups // heads]
            held *= decay[t, h][:, None]
            held += np.outer(key, beta[t, h] * (v[t, h * dim : (h + 1) * dim] - key @ held))
            out[t, h * dim : (h + 1) * dim] = q[t, h * groups // heads] @ held / np.sqrt(keys)
    return out, state


MLSTM = [(3, 20, 15, 7), (1, 256, 64, 11), (2, 33, 100, 1)]  # heads, numbers of a key, of a value, tokens


def mlstm_inputs(sequences: int, tokens: int, heads: int, keys: int, dim: int) -> tuple[Array, ...]:
    """x, gates, memories and tops; the first sequence begins with nothing."""
    random, n = np.random.default_rng(0), sequences * tokens
    gates = np.concatenate([9 * random.normal(size=(n, heads)), -np.exp(random.normal(size=(n, heads)))], axis=1)
    memory, top = random.normal(size=(sequences, heads, keys, dim + 1)), random.normal(size=(sequences, heads))
    memory[0] = top[0] = 0
    x = random.normal(size=(n, heads * (2 * keys + dim)))
    return tuple(each.astype(np.float32) for each in (x, gates, memory, top))


def check_mlstm(given: tuple[Array, ...], out: Array, after: Array, top: Array) -> None:
    """What is read, once divided, and what is kept, times the exponential that is kept apart."""
    expected, held = mlstm(*given)
    error = np.abs(out[..., :-1] / out[..., -1:] - expected[..., :-1] / expected[..., -1:])
    assert (error < 2e-4 * np.maximum(1, np.abs(expected[..., :-1] / expected[..., -1:]))).all()
    scale = np.exp(top.astype(np.float64))[..., None, None]
    np.testing.assert_allclose(after * scale / np.maximum(scale, 1), held / np.maximum(scale, 1), rtol=1e-4, atol=1e-4)


def mlstm(x: Array, gates: Array, memory: Array, top: Array) -> tuple[Array, Array]:
    """out [n, heads, dim + 1] and the memories [b, heads, keys, dim + 1] after it as they are, with no exponent apart:
    the last number of a head is what the others are to be divided by, but for eps, times the exponential of its top.
    """
    sequences, heads, keys, columns = memory.shape
    q, k, v = np.split(x.astype(np.float64), [heads * keys, 2 * heads * keys], axis=1)
    q, k, v = (each.reshape(len(x), heads, -1) for each in (q, k, v))
    out, state = np.empty((len(x), heads, columns)), memory * np.exp(top.astype(np.float64))[..., None, None]
    write, keep = np.exp(gates.astype(np.float64)).reshape(len(x), 2, heads).swapaxes(0, 1)
    for t in range(len(x)):
        s = t // (len(x) // sequences)
        values = np.concatenate([v[t], np.ones((heads, 1))], axis=1)
        state[s] = keep[t][:, None, None] * state[s] + write[t][:, None, None] * k[t][:, :, None] * values[:, None]
        out[t] = np.einsum("hk,hkc->hc", q[t], state[s]) / np.sqrt(keys)
        out[t, :, -1] = np.maximum(np.abs(out[t, :, -1]), 1)
    return out, state


def lru_gates(x: Array, w: Array, bias: Array) -> Array:
    """sigmoid(x w + bias) for each head; w: [heads, K, K]."""
    heads, width, _ = w.shape
    total = np.einsum("nhk,hkm->nhm", x.reshape(len(x), heads, width).astype(np.float64), w)
    gates: Array = 1 / (1 + np.exp(-total.reshape(len(x), -1) - bias))
    return gates


def lru(x: Array, decay: Array, before: Array) -> tuple[Array, Array]:
    """out [n, W] and the states [b, W] after it."""
    out, state = np.empty(x.shape), before.astype(np.float64)
    for t in range(len(x)):
        s = t // (len(x) // len(before))
        state[s] = out[t] = decay[t] * state[s] + x[t]
    return out, state
