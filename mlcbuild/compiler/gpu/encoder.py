"""Attention of encoders on GPUs: every token among those of its sequence, with a mask and biases by distance.

A thread has one query of one head, whose output it keeps while keys and values go by in tiles that the block has in
shared memory; the softmax is built up as they do (Dao et al., arXiv 2205.14135). No subgroups.
"""

from __future__ import annotations

import functools
from typing import Any

from tvm.script import tirx as T

_QUERIES = 32  # of a block, one for each of its threads
_KEYS, _TILE = 16, 2048  # that a block has at a time: so many keys, or fewer with so many numbers in all
_NOTHING = -1e30  # the score of a key that is not seen


@functools.cache
def masked(heads: int, dim: int, dtype: str, distances: int) -> Any:
    """qkv [n, 3 * heads * dim], mask int32 [b, s], bias float32 [heads, distances] if any -> [n, heads * dim]."""
    count = max(1, min(_KEYS, _TILE // dim))

    @T.prim_func(s_tir=True, private=True)
    def attention_biased(var_qkv: T.handle, var_mask: T.handle, var_bias: T.handle, var_out: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        n = T.int32()
        batch = T.int32()
        tokens = T.int32()
        qkv = T.match_buffer(var_qkv, (n, 3 * heads * dim), dtype)
        mask = T.match_buffer(var_mask, (batch, tokens), "int32")
        bias = T.match_buffer(var_bias, (heads, distances), "float32")
        out = T.match_buffer(var_out, (n, heads * dim), dtype)
        for by in T.thread_binding(batch * heads, thread="blockIdx.y"):
            for bx in T.thread_binding((tokens + _QUERIES - 1) // _QUERIES, thread="blockIdx.x"):
                for tx in T.thread_binding(_QUERIES, thread="threadIdx.x"):
                    with T.sblock("attention"):
                        T.reads()
                        T.writes()
                        _block(qkv, mask, bias, out, tokens, by // heads, by % heads, bx, tx, heads, dim, dtype, count)

    @T.prim_func(s_tir=True, private=True)
    def attention(var_qkv: T.handle, var_mask: T.handle, var_out: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        n = T.int32()
        batch = T.int32()
        tokens = T.int32()
        qkv = T.match_buffer(var_qkv, (n, 3 * heads * dim), dtype)
        mask = T.match_buffer(var_mask, (batch, tokens), "int32")
        out = T.match_buffer(var_out, (n, heads * dim), dtype)
        for by in T.thread_binding(batch * heads, thread="blockIdx.y"):
            for bx in T.thread_binding((tokens + _QUERIES - 1) // _QUERIES, thread="blockIdx.x"):
                for tx in T.thread_binding(_QUERIES, thread="threadIdx.x"):
                    with T.sblock("attention"):
                        T.reads()
                        T.writes()
                        _block(qkv, mask, None, out, tokens, by // heads, by % heads, bx, tx, heads, dim, dtype, count)

    return attention_biased if distances else attention


@T.macro
def _block(qkv, mask, bias, out, tokens, sequence, head, bx, tx, heads, dim, dtype, count):
    """The queries of block `bx` of one head of one sequence, among `count` keys at a time."""
    keys = T.sblock_alloc_buffer((count, dim), dtype, scope="shared")
    values = T.sblock_alloc_buffer((count, dim), dtype, scope="shared")
    query = T.sblock_alloc_buffer((dim,), "float32", scope="local")
    total = T.sblock_alloc_buffer((dim,), "float32", scope="local")
    scores = T.sblock_alloc_buffer((count,), "float32", scope="local")
    own = T.sblock_alloc_buffer((4,), "float32", scope="local")  # the largest score, the sum, a new largest, a factor
    row: T.let[T.int32] = T.min(bx * _QUERIES + tx, tokens - 1)
    own[0] = T.float32(_NOTHING)
    own[1] = T.float32(0)
    for d in range(dim):
        query[d] = T.cast(qkv[sequence * tokens + row, head * dim + d], "float32") * T.float32(dim**-0.5)
        total[d] = T.float32(0)
    for tile in range((tokens + count - 1) // count):
        T.tvm_storage_sync("shared")
        for i in range((count * dim + _QUERIES - 1) // _QUERIES):
            if i * _QUERIES + tx < count * dim:
                keys[(i * _QUERIES + tx) // dim, (i * _QUERIES + tx) % dim] = qkv[
                    sequence * tokens + T.min(tile * count + (i * _QUERIES + tx) // dim, tokens - 1),
                    heads * dim + head * dim + (i * _QUERIES + tx) % dim,
                ]
                values[(i * _QUERIES + tx) // dim, (i * _QUERIES + tx) % dim] = qkv[
                    sequence * tokens + T.min(tile * count + (i * _QUERIES + tx) // dim, tokens - 1),
                    2 * heads * dim + head * dim + (i * _QUERIES + tx) % dim,
                ]
        T.tvm_storage_sync("shared")
        own[2] = own[0]
        for j in range(count):
            scores[j] = T.float32(_NOTHING)
            if tile * count + j < tokens:  # noqa: SIM102 (the script has no short circuit)
                if mask[sequence, tile * count + j] != 0:
                    scores[j] = T.float32(0)
                    for d in range(dim):
                        scores[j] = scores[j] + query[d] * T.cast(keys[j, d], "float32")
                    if bias is not None:
                        scores[j] = scores[j] + bias[head, tile * count + j - row + bias.shape[1] // 2]
            own[2] = T.max(own[2], scores[j])
        own[3] = T.exp(own[0] - own[2])
        own[0] = own[2]
        own[1] = own[1] * own[3]
        for d in range(dim):
            total[d] = total[d] * own[3]
        for j in range(count):
            if scores[j] > T.float32(_NOTHING):
                own[3] = T.exp(scores[j] - own[0])
                own[1] = own[1] + own[3]
                for d in range(dim):
                    total[d] = total[d] + own[3] * T.cast(values[j, d], "float32")
    if bx * _QUERIES + tx < tokens:
        for d in range(dim):
            out[sequence * tokens + row, head * dim + d] = T.cast(
                total[d] / T.if_then_else(own[1] > T.float32(0), own[1], T.float32(1)), dtype
            )
