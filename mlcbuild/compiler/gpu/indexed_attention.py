"""Attention to the keys that an indexer chooses (mlcbuild.models.indexer), on any GPU: simple kernels of our own.

A call of scale 0 chooses, by a kernel of its own (indexed_choice.py). Attention has a block of threads for a row and
some heads: every key that is chosen, or all, by one thread, and then the columns of values. Each block reads its keys
for itself.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlcbuild.compiler.gpu.indexed_choice import choose
from mlcbuild.compiler.gpu.indexed_lists import PAGE, THREADS, cached_keys, new_keys, position_of, sizes_of
from mlcbuild.compiler.gpu.latent_attention import one_by_one
from mlcbuild.models.structure import Structure

_AT_ONCE = 128  # rows for which keys are chosen, each with a score for every key
_NONE, _LOG2E = -5e4, 1.4426950408889634


@T.macro
def _attend(z, source, q, out, lse, row, first_head, tx, own, start, length, scale):
    """A row's heads from `first_head` on: over the keys of its list that are in the set, or all."""
    with T.sblock("attend"):
        T.reads()
        T.writes()
        query = T.sblock_alloc_buffer((z.group * z.used,), "float32", scope="shared")
        weights = T.sblock_alloc_buffer((z.group * THREADS,), "float32", scope="shared")
        places = T.sblock_alloc_buffer((THREADS,), "int32", scope="shared")
        part = T.sblock_alloc_buffer((z.group,), "float32", scope="local")
        most = T.sblock_alloc_buffer((z.group,), "float32", scope="local")
        whole = T.sblock_alloc_buffer((z.group,), "float32", scope="local")
        sums = T.sblock_alloc_buffer((z.group * z.columns,), "float32", scope="local")
        one = T.sblock_alloc_buffer((2,), "float32", scope="local")
        place = T.sblock_alloc_buffer((1,), "int32", scope="local")
        back: T.let[T.int32] = own - start
        seen: T.let[T.int32] = T.min(length, back + 1)
        first: T.let[T.int32] = z.first_seen(scale, back)
        listed: T.let[T.int32] = T.if_then_else(position_of(z, q, row, 0) >= 0, 1, 0)
        steps: T.let[T.int32] = T.if_then_else(listed == 1, z.rounds, (T.max(seen - first, 0) + THREADS - 1) // THREADS)
        for i in range((z.group * z.used + THREADS - 1) // THREADS):
            at: T.let[T.int32] = i * THREADS + tx
            if at < z.group * z.used:
                query[at] = z.query_number(q, row, first_head + at // z.used, at % z.used) * (
                    T.abs(scale) * T.float32(_LOG2E)
                )
        for g in T.unroll(z.group):
            most[g] = T.float32(_NONE)
            whole[g] = T.float32(0)
            for c in T.unroll(z.columns):
                sums[g * z.columns + c] = T.float32(0)
            if back < length + z.no_sinks:
                one[0] = z.query_number(q, row, first_head + g, z.dim - 1) * T.float32(_LOG2E)
                most[g] = T.max(one[0], T.float32(_NONE))
                whole[g] = T.exp2(one[0] - most[g])
        for step in range(steps):
            T.tvm_storage_sync("shared")
            at: T.let[T.int32] = step * THREADS + tx
            if listed == 1:
                place[0] = position_of(z, q, row, T.min(at, z.it.keys - 1)) - start
                places[tx] = T.if_then_else(at < z.it.keys and place[0] >= 0 and place[0] < length, place[0], -1)
            else:
                places[tx] = T.if_then_else(first + at < seen, first + at, -1)
            place[0] = places[tx]
            for g in T.unroll(z.group):
                part[g] = T.float32(0)
            if place[0] >= 0:
                for d in range(z.used):
                    one[0] = z.number(source, first_head, place[0], d, False)
                    for g in T.unroll(z.group):
                        part[g] = part[g] + query[g * z.used + d] * one[0]
            for g in T.unroll(z.group):
                weights[g * THREADS + tx] = T.if_then_else(place[0] >= 0, part[g], T.float32(2 * _NONE))
            T.tvm_storage_sync("shared")
            for g in T.unroll(z.group):
                one[0] = most[g]
                for i in range(THREADS):
                    one[0] = T.max(one[0], weights[g * THREADS + i])
                one[1] = T.exp2(most[g] - one[0])
                most[g] = one[0]
                whole[g] = whole[g] * one[1]
                for c in T.unroll(z.columns):
                    sums[g * z.columns + c] = sums[g * z.columns + c] * one[1]
                part[g] = T.exp2(weights[g * THREADS + tx] - one[0])
            T.tvm_storage_sync("shared")
            for g in T.unroll(z.group):
                weights[g * THREADS + tx] = part[g]
            T.tvm_storage_sync("shared")
            for i in range(THREADS):
                place[0] = places[i]
                if place[0] >= 0:
                    for g in T.unroll(z.group):
                        whole[g] = whole[g] + weights[g * THREADS + i]
                    for c in T.unroll(z.columns):
                        if c * THREADS + tx < z.summed:
                            one[0] = z.number(source, first_head, place[0], c * THREADS + tx, True)
                            for g in T.unroll(z.group):
                                sums[g * z.columns + c] = sums[g * z.columns + c] + weights[g * THREADS + i] * one[0]
        if tx == 0 and first_head == 0:
            out[row, z.behind(z.mark), z.mark % z.dim] = T.cast(T.float32(0), z.dtype)
        for g in T.unroll(z.group):
            one[0] = T.if_then_else(whole[g] > T.float32(0), T.float32(1) / whole[g], T.float32(0))
            one[1] = T.if_then_else(whole[g] > T.float32(0), most[g] + T.log2(whole[g]), T.float32(_NONE))
            for c in T.unroll(z.columns):
                if c * THREADS + tx < z.summed:
                    at = T.meta_var(c * THREADS + tx)
                    head = T.meta_var(2 * (first_head + g) + at // z.dim if z.joined else first_head + g)
                    out[row, head, at % z.dim] = T.cast(sums[g * z.columns + c] * one[0], z.dtype)
            if tx == 0:
                for half in T.unroll(1 + z.joined):
                    lse[row, (first_head + g) * (1 + z.joined) + half] = one[1]


@T.macro
def _find(span, keys, indptr, batch, row):
    """A row's sequence, and of its keys the first, its position and how many they are."""
    span[0] = 0
    for i in range(batch):
        if indptr[i + 1] <= row:
            span[0] = i + 1
    span[1] = keys.first(span[0])
    span[2] = keys.start(span[0], row)
    span[3] = keys.length(span[0])


@T.macro
def _launch(z, n, batch, longest, indptr, keys, q, out, lse, positions, scale):
    """Both kernels; no set has more than `longest` keys."""
    stride = T.meta_var((longest + (THREADS - 1)) // THREADS * THREADS)
    scores = T.sblock_alloc_buffer((T.min(n, _AT_ONCE) * stride + 4,), "int32")
    T.evaluate(scores.data)  # named on the host, which is to allocate it
    if T.tvm_thread_invariant(scale == T.float32(0)):
        for bx in T.thread_binding(T.min(n, _AT_ONCE), thread="blockIdx.x"):
            for tx in T.thread_binding(THREADS, thread="threadIdx.x"):
                with T.sblock("rows_thatchoose"):
                    T.reads()
                    T.writes()
                    span = T.sblock_alloc_buffer((4,), "int32", scope="local")
                    for turn in range((n + _AT_ONCE - 1) // _AT_ONCE):
                        row: T.let[T.int32] = turn * _AT_ONCE + bx
                        if row < n:
                            _find(span, keys, indptr, batch, row)
                            source = T.meta_var(keys.source(span[1]))
                            choose(z, source, q, out, scores, bx * stride, row, tx, positions[row], span[2], span[3])
    if T.tvm_thread_invariant(scale != T.float32(0)):
        for bx in T.thread_binding(n, thread="blockIdx.x"):
            for by in T.thread_binding(z.heads // z.group, thread="blockIdx.y"):
                for tx in T.thread_binding(THREADS, thread="threadIdx.x"):
                    with T.sblock("rows_that_attend"):
                        T.reads()
                        T.writes()
                        span = T.sblock_alloc_buffer((4,), "int32", scope="local")
                        _find(span, keys, indptr, batch, bx)
                        source = T.meta_var(keys.source(span[1]))
                        _attend(z, source, q, out, lse, bx, by * z.group, tx, positions[bx], span[2], span[3], scale)


def ragged(s: Structure, dtype: str) -> Any:
    """New tokens among themselves, with the arguments of TVM's kernel."""
    z = sizes_of(s, dtype)

    @T.prim_func(s_tir=True, private=True)
    def attention_prefill_ragged(
        q_: T.handle, q_indptr_: T.handle, k_: T.handle, v_: T.handle, kv_indptr_: T.handle, positions_: T.handle,
        offsets_: T.handle, out_: T.handle, lse_: T.handle, causal: T.int32, rotary_mode: T.int32,
        rope_scale: T.float32, rope_theta: T.float32, sm_scale: T.float32,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True})
        n = T.int32()
        kv = T.int32()
        batch = T.int32()
        q_indptr_at = T.int32()
        kv_indptr_at = T.int32()
        positions_at = T.int32()
        offsets_at = T.int32()
        q = T.match_buffer(q_, (n, z.total, z.dim), dtype)
        q_indptr = T.match_buffer(q_indptr_, (batch + 1,), "int32", elem_offset=q_indptr_at)
        k = T.match_buffer(k_, (kv, z.stored, z.dim), dtype)
        v = T.match_buffer(v_, (kv, z.stored, z.dim), dtype)
        kv_indptr = T.match_buffer(kv_indptr_, (batch + 1,), "int32", elem_offset=kv_indptr_at)
        positions = T.match_buffer(positions_, (n,), "int32", elem_offset=positions_at)
        T.match_buffer(offsets_, (batch,), "int32", elem_offset=offsets_at)
        out = T.match_buffer(out_, (n, z.total, z.dim), dtype)
        lse = T.match_buffer(lse_, (n, z.total), "float32")
        keys = T.meta_var(new_keys(k, v, q_indptr, kv_indptr, positions))
        _launch(z, n, batch, kv, q_indptr, keys, q, out, lse, positions, sm_scale)

    return attention_prefill_ragged


def prefill(s: Structure, dtype: str) -> Any:
    """New tokens over cached pages."""
    z = sizes_of(s, dtype)

    @T.prim_func(s_tir=True, private=True)
    def attention_prefill(
        q_: T.handle, q_indptr_: T.handle, pages_: T.handle, indptr_: T.handle, numbers_: T.handle, last_: T.handle,
        offsets_: T.handle, positions_: T.handle, out_: T.handle, lse_: T.handle, causal: T.int32,
        rotary_mode: T.int32, rope_scale: T.float32, rope_theta: T.float32, sm_scale: T.float32,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True})
        n = T.int32()
        batch = T.int32()
        held = T.int32()
        most = T.int32()
        pages_at = T.int64()
        q_indptr_at = T.int32()
        indptr_at = T.int32()
        numbers_at = T.int32()
        last_at = T.int32()
        offsets_at = T.int32()
        positions_at = T.int32()
        q = T.match_buffer(q_, (n, z.total, z.dim), dtype)
        q_indptr = T.match_buffer(q_indptr_, (batch + 1,), "int32", elem_offset=q_indptr_at)
        pages = T.match_buffer(pages_, (most, 2, z.stored, PAGE, z.dim), dtype, elem_offset=pages_at)
        indptr = T.match_buffer(indptr_, (batch + 1,), "int32", elem_offset=indptr_at)
        numbers = T.match_buffer(numbers_, (held,), "int32", elem_offset=numbers_at)
        last = T.match_buffer(last_, (batch,), "int32", elem_offset=last_at)
        offsets = T.match_buffer(offsets_, (batch,), "int32", elem_offset=offsets_at)
        positions = T.match_buffer(positions_, (n,), "int32", elem_offset=positions_at)
        out = T.match_buffer(out_, (n, z.total, z.dim), dtype)
        lse = T.match_buffer(lse_, (n, z.total), "float32")
        keys = T.meta_var(cached_keys(pages, indptr, numbers, last, offsets))
        _launch(z, n, batch, held * PAGE, q_indptr, keys, q, out, lse, positions, sm_scale)

    return attention_prefill


def decode(s: Structure, dtype: str) -> Any:
    """One new token of each sequence over cached pages."""
    return one_by_one(prefill(s, dtype))
