"""Recurrences on GPUs, for the table that recurrent models take (mlcbuild.models.recurrent.operations).

A thread has one channel of one sequence and goes through its tokens in order, with the channel's state in registers;
neighbouring threads have neighbouring channels. Threads need nothing of each other: no barriers, no subgroups. What is
the same for every token (convolutions, narrow products) is shared out by value.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tvm import relax, te, tirx
from tvm.script import tirx as T

from mlcbuild.compiler import operations
from mlcbuild.compiler.gpu.delta import delta as _delta
from mlcbuild.compiler.gpu.lru import gates as _lru_gates
from mlcbuild.compiler.gpu.lru import lru as _lru
from mlcbuild.compiler.gpu.mlstm import mlstm as _mlstm
from mlcbuild.compiler.gpu.rows import float32, widened
from mlcbuild.compiler.gpu.state_space import scan as _scan
from mlcbuild.models.operations import Expr
from mlcbuild.models.recurrent.operations import Recurrence, Scanned

_THREADS = 64  # of a block: few, so that one sequence's channels make many blocks
NARROW = "narrow_product"  # the block of `project`, which schedules.py looks for: a thread for each value


def recurrence(builder: relax.BlockBuilder, dtype: str) -> Recurrence:
    """Operations that emit into `builder`; `dtype` is the model dtype."""

    def call(function: Any, name: str, arguments: Sequence[Expr], shapes: Sequence[Sequence[Expr]]) -> tuple[Expr, ...]:
        results = [(shape, "float32") for shape in shapes]
        return tuple(operations.call_all(builder, function, name, arguments, results))

    def wkv4(key: Expr, value: Expr, decay: Expr, bonus: Expr, state: Sequence[Expr]) -> tuple[Expr, ...]:
        shape, states = list(key.ty.shape), [list(each.ty.shape) for each in state]
        rates = builder.emit(relax.op.concat([decay, bonus], axis=0))  # browsers give a kernel ten buffers
        return call(_wkv4(int(shape[1])), "wkv4", [key, value, rates, *state], [shape, *states])

    def wkv(r: Expr, k: Expr, v: Expr, decay: Expr, bonus: Expr, state: Expr, heads: int) -> tuple[Expr, ...]:
        varies = not (isinstance(decay.ty.shape[0], tirx.IntImm) and int(decay.ty.shape[0]) == 1)
        function = _wkv(heads, int(r.ty.shape[1]) // heads, varies)
        return call(function, "wkv", [r, k, v, decay, bonus, state], [list(r.ty.shape), list(state.ty.shape)])

    def project(x: Expr, w: Expr) -> Expr:
        return builder.emit_te(_project, x, w, primfunc_attrs={"op_pattern": 8}, primfunc_name_hint="project")

    def convolve(x: Expr, w: Expr, bias: Expr | None, state: Expr, activated: bool) -> tuple[Expr, Expr]:
        out = builder.emit_te(_convolved, x, w, bias, state, activated, primfunc_name_hint="convolve")
        return out, builder.emit_te(_last_inputs, x, state, primfunc_name_hint="last_inputs")

    def scan(*given: Any) -> tuple[Expr, ...]:
        *inputs, scanned = given
        shapes = [list(inputs[0].ty.shape), list(inputs[-1].ty.shape)]
        return call(_scan(scanned), "scan", inputs, shapes)

    def delta(x: Expr, decay: Expr, beta: Expr, state: Expr, scanned: Scanned) -> tuple[Expr, ...]:
        shapes = [[x.ty.shape[0], scanned.heads * scanned.dim], list(state.ty.shape)]
        return call(_delta(scanned), "delta", [x, decay, beta, state], shapes)

    def mlstm(x: Expr, gates: Expr, memory: Expr, top: Expr, scanned: Scanned) -> tuple[Expr, ...]:
        shapes = [[x.ty.shape[0], scanned.heads * (scanned.dim + 1)], list(memory.ty.shape), list(top.ty.shape)]
        return call(_mlstm(scanned), "mlstm", [x, gates, memory, top], shapes)

    def lru_gates(x: Expr, w: Expr, bias: Expr) -> Expr:
        heads, width, _ = (int(size) for size in w.ty.shape)
        return call(_lru_gates(heads, width), "lru_gates", [x, w, bias], [list(x.ty.shape)])[0]

    def lru(x: Expr, decay: Expr, state: Expr) -> tuple[Expr, ...]:
        shapes = [list(x.ty.shape), list(state.ty.shape)]
        return call(_lru(int(x.ty.shape[1])), "lru", [x, decay, state], shapes)

    return Recurrence(wkv4, wkv, project, convolve, scan, delta, mlstm, lru_gates, lru)


@functools.cache
def _wkv4(width: int) -> Any:
    blocks = -(-width // _THREADS)

    @T.prim_func(s_tir=True, private=True)
    def wkv4(
        var_key: T.handle, var_value: T.handle, var_rates: T.handle, var_a: T.handle, var_b: T.handle, var_m: T.handle,
        var_out: T.handle, var_a_after: T.handle, var_b_after: T.handle, var_m_after: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        n = T.int32()
        batch = T.int32()
        key = T.match_buffer(var_key, (n, width), "float32")
        value = T.match_buffer(var_value, (n, width), "float32")
        rates = T.match_buffer(var_rates, (2 * width,), "float32")  # decays, then bonuses
        a = T.match_buffer(var_a, (batch, width), "float32")
        b = T.match_buffer(var_b, (batch, width), "float32")
        m = T.match_buffer(var_m, (batch, width), "float32")
        out = T.match_buffer(var_out, (n, width), "float32")
        a_after = T.match_buffer(var_a_after, (batch, width), "float32")
        b_after = T.match_buffer(var_b_after, (batch, width), "float32")
        m_after = T.match_buffer(var_m_after, (batch, width), "float32")
        for by in T.thread_binding(batch, thread="blockIdx.y"):
            for bx in T.thread_binding(blocks, thread="blockIdx.x"):
                for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with T.sblock("wkv4"):
                        T.reads()
                        T.writes()
                        state = T.sblock_alloc_buffer((3,), "float32", scope="local")  # a, b, m
                        own = T.sblock_alloc_buffer((5,), "float32", scope="local")  # key, value, top, before, weight
                        c: T.let[T.int32] = bx * _THREADS + tx
                        if c < width:
                            state[0] = a[by, c]
                            state[1] = b[by, c]
                            state[2] = m[by, c]
                            for t in range(n // batch):
                                own[0] = key[by * (n // batch) + t, c]
                                own[1] = value[by * (n // batch) + t, c]
                                own[2] = T.max(state[2], own[0] + rates[width + c])
                                own[3] = T.exp(state[2] - own[2])
                                own[4] = T.exp(own[0] + rates[width + c] - own[2])
                                out[by * (n // batch) + t, c] = (own[3] * state[0] + own[4] * own[1]) / (
                                    own[3] * state[1] + own[4]
                                )
                                own[2] = T.max(state[2] + rates[c], own[0])
                                own[3] = T.exp(state[2] + rates[c] - own[2])
                                own[4] = T.exp(own[0] - own[2])
                                state[0] = own[3] * state[0] + own[4] * own[1]
                                state[1] = own[3] * state[1] + own[4]
                                state[2] = own[2]
                            a_after[by, c] = state[0]
                            b_after[by, c] = state[1]
                            m_after[by, c] = state[2]

    return wkv4


@functools.cache
def _wkv(heads: int, dim: int, varies: bool) -> Any:
    """`varies`: every token has a decay of its own. A thread has a row of its head's state."""
    width = heads * dim
    blocks = -(-width // _THREADS)

    @T.prim_func(s_tir=True, private=True)
    def wkv(
        var_r: T.handle, var_k: T.handle, var_v: T.handle, var_decay: T.handle, var_bonus: T.handle,
        var_before: T.handle, var_out: T.handle, var_after: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        n = T.int32()
        batch = T.int32()
        r = T.match_buffer(var_r, (n, width), "float32")
        k = T.match_buffer(var_k, (n, width), "float32")
        v = T.match_buffer(var_v, (n, width), "float32")
        decay = T.match_buffer(var_decay, (n if varies else 1, width), "float32")
        bonus = T.match_buffer(var_bonus, (width,), "float32")
        before = T.match_buffer(var_before, (batch, width * dim), "float32")
        out = T.match_buffer(var_out, (n, width), "float32")
        after = T.match_buffer(var_after, (batch, width * dim), "float32")
        for by in T.thread_binding(batch, thread="blockIdx.y"):
            for bx in T.thread_binding(blocks, thread="blockIdx.x"):
                for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with T.sblock("wkv"):
                        T.reads()
                        T.writes()
                        state = T.sblock_alloc_buffer((dim,), "float32", scope="local")
                        own = T.sblock_alloc_buffer((3,), "float32", scope="local")  # value, key times it, sum
                        c: T.let[T.int32] = bx * _THREADS + tx
                        first: T.let[T.int32] = c // dim * dim  # of the head's channels
                        if c < width:
                            for j in range(dim):
                                state[j] = before[by, c * dim + j]
                            for t in range(n // batch):
                                own[0] = v[by * (n // batch) + t, c]
                                own[2] = T.float32(0)
                                for j in range(dim):
                                    own[1] = k[by * (n // batch) + t, first + j] * own[0]
                                    own[2] = own[2] + r[by * (n // batch) + t, first + j] * (
                                        state[j] + bonus[first + j] * own[1]
                                    )
                                    state[j] = (
                                        decay[by * (n // batch) + t if varies else 0, first + j] * state[j] + own[1]
                                    )
                                out[by * (n // batch) + t, c] = own[2]
                            for j in range(dim):
                                after[by, c * dim + j] = state[j]

    return wkv


def _project(x: te.Tensor, w: te.Tensor) -> te.Tensor:
    groups, depth, width = w.shape
    d = te.reduce_axis((0, depth), "d")
    return te.compute(
        (groups, x.shape[0], width),
        lambda g, i, j: te.sum(x[i, g * depth + d] * widened(w[g, d, j]), axis=d),
        name=NARROW,
    )


def _input(x: te.Tensor, state: te.Tensor, sequence: Any, token: Any, channel: Any) -> Any:
    """A channel's input at a token of its sequence; those before the first one are in the state."""
    tokens, width = x.shape[0] // state.shape[0], x.shape[1]
    kept = state.shape[1] // width
    return tirx.if_then_else(
        token < 0, state[sequence, (token + kept) * width + channel], x[sequence * tokens + token, channel]
    )


def _convolved(x: te.Tensor, w: te.Tensor, bias: te.Tensor | None, state: te.Tensor, activated: bool) -> te.Tensor:
    tokens, taps = x.shape[0] // state.shape[0], int(w.shape[2])

    def value(i: Any, c: Any) -> Any:
        total = float32(0) if bias is None else bias[c]
        for j in range(taps):
            total = total + w[c, 0, j] * _input(x, state, i // tokens, i % tokens + (j - taps + 1), c)
        return total / (float32(1) + tirx.exp(-total)) if activated else total

    return te.compute(x.shape, value, name="convolved")


def _last_inputs(x: te.Tensor, state: te.Tensor) -> te.Tensor:
    tokens, width = x.shape[0] // state.shape[0], x.shape[1]
    kept = state.shape[1] // width
    return te.compute(
        state.shape, lambda s, i: _input(x, state, s, tokens - kept + i // width, i % width), name="last_inputs"
    )
