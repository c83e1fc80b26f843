"""In-place logit processing: bias, penalties, bit mask. Arguments as in docs/contract.md.

Each kernel is written once for CPUs, one token after the other, and once for GPUs, by blocks of threads.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T


def functions(threads: int | None) -> dict[str, Any]:
    """PrimFuncs by their exported names, with blocks of `threads` threads; None: for CPUs."""
    return {
        "apply_logit_bias_inplace": _bias(threads),
        "apply_penalty_inplace": _penalty(threads),
        "apply_bitmask_inplace": _bitmask(threads),
    }


def _bias(threads: int | None) -> Any:
    """logits[pos2seq_id[i], token_ids[i]] += logit_bias[i]; a token comes once per sequence."""

    @T.prim_func(s_tir=True, private=True)
    def apply_logit_bias_inplace(
        var_logits: T.handle, var_pos2seq_id: T.handle, var_token_ids: T.handle, var_logit_bias: T.handle
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        batch = T.int32()
        vocab = T.int32()
        tokens = T.int32()
        logits = T.match_buffer(var_logits, (batch, vocab), "float32")
        pos2seq_id = T.match_buffer(var_pos2seq_id, (tokens,), "int32")
        token_ids = T.match_buffer(var_token_ids, (tokens,), "int32")
        logit_bias = T.match_buffer(var_logit_bias, (tokens,), "float32")
        if threads is None:
            for i in range(tokens):
                with T.sblock("bias"):
                    v = T.axis.opaque(tokens, i)
                    logits[pos2seq_id[v], token_ids[v]] = logits[pos2seq_id[v], token_ids[v]] + logit_bias[v]
        else:
            for bx in T.thread_binding((tokens + threads - 1) // threads, thread="blockIdx.x"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("bias"):
                        T.reads()
                        T.writes()
                        i: T.let[T.int32] = bx * threads + tx
                        if i < tokens:
                            logits[pos2seq_id[i], token_ids[i]] = logits[pos2seq_id[i], token_ids[i]] + logit_bias[i]

    return apply_logit_bias_inplace


def _penalty(threads: int | None) -> Any:
    """Presence and frequency are subtracted; repetition divides what is positive and multiplies what is not.

    penalties [s, 3] holds (presence, frequency, repetition) of sequence pos2seq_id[i], whose logits are row
    seq_ids[pos2seq_id[i]]; token_cnt[i] counts how often token_ids[i] was seen.
    """

    @T.prim_func(s_tir=True, private=True)
    def apply_penalty_inplace(
        var_logits: T.handle, var_seq_ids: T.handle, var_pos2seq_id: T.handle, var_token_ids: T.handle,
        var_token_cnt: T.handle, var_penalties: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        batch = T.int32()
        vocab = T.int32()
        tokens = T.int32()
        sequences = T.int32()
        logits = T.match_buffer(var_logits, (batch, vocab), "float32")
        seq_ids = T.match_buffer(var_seq_ids, (sequences,), "int32")
        pos2seq_id = T.match_buffer(var_pos2seq_id, (tokens,), "int32")
        token_ids = T.match_buffer(var_token_ids, (tokens,), "int32")
        token_cnt = T.match_buffer(var_token_cnt, (tokens,), "int32")
        penalties = T.match_buffer(var_penalties, (sequences, 3), "float32")
        if threads is None:
            for i in range(tokens):
                with T.sblock("penalty"):
                    v = T.axis.opaque(tokens, i)
                    row: T.let[T.int32] = seq_ids[pos2seq_id[v]]
                    logits[row, token_ids[v]] = logits[row, token_ids[v]] - (
                        penalties[pos2seq_id[v], 0] + T.cast(token_cnt[v], "float32") * penalties[pos2seq_id[v], 1]
                    )
                    logits[row, token_ids[v]] = T.if_then_else(
                        logits[row, token_ids[v]] < T.float32(0),
                        logits[row, token_ids[v]] * penalties[pos2seq_id[v], 2],
                        logits[row, token_ids[v]] / penalties[pos2seq_id[v], 2],
                    )
        else:
            for bx in T.thread_binding((tokens + threads - 1) // threads, thread="blockIdx.x"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("penalty"):
                        T.reads()
                        T.writes()
                        less = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        i: T.let[T.int32] = bx * threads + tx
                        if i < tokens:
                            s: T.let[T.int32] = pos2seq_id[i]
                            less[0] = logits[seq_ids[s], token_ids[i]] - (
                                penalties[s, 0] + T.cast(token_cnt[i], "float32") * penalties[s, 1]
                            )
                            logits[seq_ids[s], token_ids[i]] = T.if_then_else(
                                less[0] < T.float32(0), less[0] * penalties[s, 2], less[0] / penalties[s, 2]
                            )

    return apply_penalty_inplace


def _bitmask(threads: int | None) -> Any:
    """Tokens whose bit is 0 get the lowest float: bitmask [b, ceil(V / 32)] int32, the lowest bit first."""

    @T.prim_func(s_tir=True, private=True)
    def apply_bitmask_inplace(var_logits: T.handle, var_seq_ids: T.handle, var_bitmask: T.handle):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        batch = T.int32()
        vocab = T.int32()
        sequences = T.int32()
        logits = T.match_buffer(var_logits, (batch, vocab), "float32")
        seq_ids = T.match_buffer(var_seq_ids, (sequences,), "int32")
        bitmask = T.match_buffer(var_bitmask, (batch, (vocab + 31) // 32), "int32")
        if threads is None:
            for s, t in T.grid(sequences, vocab):
                with T.sblock("mask"):
                    vs, vt = T.axis.remap("SS", [s, t])
                    row: T.let[T.int32] = seq_ids[vs]
                    if T.bitwise_and(T.shift_right(bitmask[row, vt // 32], vt % 32), 1) == 0:
                        logits[row, vt] = T.min_value("float32")
        else:
            for s in T.thread_binding(sequences, thread="blockIdx.y"):
                for bx in T.thread_binding((vocab + threads - 1) // threads, thread="blockIdx.x"):
                    for tx in T.thread_binding(threads, thread="threadIdx.x"):
                        with T.sblock("mask"):
                            T.reads()
                            T.writes()
                            t: T.let[T.int32] = bx * threads + tx
                            if t < vocab:  # noqa: SIM102 (the script has no short circuit)
                                if T.bitwise_and(T.shift_right(bitmask[seq_ids[s], t // 32], t % 32), 1) == 0:
                                    logits[seq_ids[s], t] = T.min_value("float32")

    return apply_bitmask_inplace
