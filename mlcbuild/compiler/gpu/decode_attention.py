"""Attention of one new token of each sequence over its cached pages, on devices whose language is not CUDA's.

A block has a part of a sequence's keys and up to eight query heads that share a key head. Its threads multiply a step
of keys with all of these, four threads to a key; then each has a key's scores, and then a few columns of the values. So
there are six barriers to a step, where TVM's kernel has as many to each key. Where sequences and heads are too few for
a device, their pages are split into parts, which a second kernel joins (Dao et al., Flash-Decoding).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from mlcbuild.compiler.gpu.rows import float32
from mlcbuild.models.structure import Structure

_PAGE = 16  # tokens
_THREADS, _LANES = 128, 4  # of a block; along a key
_SHARING = 8  # query heads of a block
_KEYS = 4  # of a thread in a step, at most
_VALUES = 4  # whose loads a thread has on their way
_BLOCKS = 128  # that a device shall have
_PAGES = 16  # of a part, on the average of all sequences
_NONE = -5e4  # the logarithm of no key's share


def decode(structure: Structure, dtype: str, slope: Callable[[Any], Any], most_shared: int) -> Any:
    """`attention_decode` with the arguments of TVM's; `slope` is a head's, of linear biases, in powers of two.

    `most_shared`: bytes of a block's shared memory.
    """
    s = structure
    heads, kv_heads, dim = s.num_attention_heads, s.num_key_value_heads, s.head_dim
    group, columns = heads // kv_heads, dim // 4
    own = min(_SHARING, 1 << (group - 1).bit_length())
    while own > 1 and _shared_bytes(own, dim) > most_shared:
        own //= 2
    tiles = -(-group // own)
    each = _each(own)
    step, turns = _THREADS // _LANES * each, _THREADS // columns
    across = -(-columns // _LANES)  # vectors of a key that a thread multiplies
    pair = 2 if across % 2 == 0 else 1
    padded = across * _LANES * 4
    segments = _THREADS // own
    length_of_segment = step // segments
    rounds = -(-step // (turns * _VALUES))
    sinks, size = "sinks" in s.roles(), dim + 4
    window, cap, bias = s.sliding_window_size, s.attn_logit_softcapping, s.alibi_bias_max

    def first_key(scale: Any, position: Any, back: Any) -> Any:
        if window is None:
            return 0
        reach = position % window + 1 if s.chunked else window
        return tirx.if_then_else(scale < float32(0), tirx.max(back - reach + 1, 0), 0)

    def place(origin: Any, places: Any, left: Any, key: Any) -> Any:
        """Where a step's key begins; for keys behind the last of the `left` ones, where that one does."""
        key = tirx.min(key, tirx.min(left, step) - 1)
        return (origin + places[key // _PAGE] + key % _PAGE * columns) * 4

    def weight(weights: Any, first: Any, key: Any) -> Any:
        """What a step's key has of the softmax; nothing where there is no such key."""
        return tirx.if_then_else(key < step, weights[first + tirx.min(key, step - 1)], float32(0))

    def vector(buffer: Any, at: Any) -> Any:
        return tirx.BufferLoad(buffer, [tirx.Ramp(at, 1, 4)])

    def score(total: Any, head: Any, distance: Any) -> Any:
        if cap is not None:  # tanh(x) = 1 - 2 / (exp(2 x) + 1), bounded above
            power = tirx.exp2(tirx.min(total * float32(2 / cap), float32(100)))
            total = float32(cap * math.log2(math.e)) * (float32(1) - float32(2) / (power + float32(1)))
        return total if bias is None else total - slope(head) * distance.astype("float32")

    def logarithm(most: Any, total: Any) -> Any:
        return tirx.if_then_else(total > float32(0), most + tirx.log2(total), float32(_NONE))

    def with_sink(lse: Any, sink: Any, own_key: Any) -> Any:
        if not sinks:
            return lse
        sink = sink.astype("float32") * float32(math.log2(math.e))
        most = tirx.max(lse, sink)
        return tirx.if_then_else(own_key, most + tirx.log2(tirx.exp2(lse - most) + tirx.exp2(sink - most)), lse)

    @T.prim_func(s_tir=True, private=True)
    def attention_decode(
        q: T.handle,
        pages_: T.handle,
        starts: T.handle,
        numbers: T.handle,
        lengths: T.handle,
        offsets: T.handle,
        positions: T.handle,
        out: T.handle,
        lse_: T.handle,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.HoistIfThenElseExprWithBlock": 1})
        B = T.int32()
        nnz_pages = T.int32()
        max_num_pages = T.int32()
        pages_elem_offset = T.int64()
        page_indptr_elem_offset = T.int32()
        page_values_elem_offset = T.int32()
        k_rope_pos_offset_elem_offset = T.int32()
        q_rope_position_elem_offset = T.int32()
        length_info_elem_offset = T.int32()
        Q = T.match_buffer(q, (B, heads, dim), dtype)
        pages = T.match_buffer(pages_, (max_num_pages, 2, kv_heads, _PAGE, dim), dtype, elem_offset=pages_elem_offset)
        page_table_indptr = T.match_buffer(starts, (B + 1,), "int32", elem_offset=page_indptr_elem_offset)
        page_table_values = T.match_buffer(numbers, (nnz_pages,), "int32", elem_offset=page_values_elem_offset)
        length_info = T.match_buffer(lengths, (B,), "int32", elem_offset=length_info_elem_offset)
        k_rope_pos_offset = T.match_buffer(offsets, (B,), "int32", elem_offset=k_rope_pos_offset_elem_offset)
        q_rope_position = T.match_buffer(positions, (B,), "int32", elem_offset=q_rope_position_elem_offset)
        output = T.match_buffer(out, (B, heads, dim), dtype)
        lse = T.match_buffer(lse_, (B, heads), "float32")
        blocks = T.meta_var(B * (kv_heads * tiles))
        splits = T.meta_var(
            T.max(1, T.min(T.truncdiv(blocks + (_BLOCKS - 1), blocks), T.truncdiv(nnz_pages, B * _PAGES)))
        )
        parts = T.sblock_alloc_buffer((T.min(splits - 1, 1) * (B * splits * (heads * size)) + 4,), "float32")
        T.evaluate(parts.data)  # named on the host, which is to allocate it
        for bx in T.thread_binding(B, thread="blockIdx.x"):
            for by in T.thread_binding(kv_heads * tiles * splits, thread="blockIdx.y"):
                for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with T.sblock("attend"):
                        T.reads()
                        T.writes()
                        query = T.sblock_alloc_buffer((own * padded,), "float32", scope="shared")
                        exchange = T.sblock_alloc_buffer((_exchange(own, dim),), "float32", scope="shared")
                        scores = T.sblock_alloc_buffer((own * step,), "float32", scope="shared")
                        weights = T.sblock_alloc_buffer((own * step,), "float32", scope="shared")
                        reduced = T.sblock_alloc_buffer((_THREADS,), "float32", scope="shared")
                        places = T.sblock_alloc_buffer((step // _PAGE,), "int32", scope="shared")
                        keys = T.sblock_alloc_buffer((each * pair,), "float32x4", scope="local")
                        factor = T.sblock_alloc_buffer((1,), "float32x4", scope="local")
                        values = T.sblock_alloc_buffer((_VALUES,), "float32x4", scope="local")
                        sums = T.sblock_alloc_buffer((own,), "float32x4", scope="local")
                        part = T.sblock_alloc_buffer((own * each,), "float32", scope="local")
                        most = T.sblock_alloc_buffer((own,), "float32", scope="local")
                        total = T.sblock_alloc_buffer((own,), "float32", scope="local")
                        one = T.sblock_alloc_buffer((4,), "float32", scope="local")
                        span = T.sblock_alloc_buffer((5,), "int32", scope="local")  # in memory: see vector_rows.py
                        first = T.meta_var(span[0])
                        start = T.meta_var(span[1])
                        end = T.meta_var(span[2])
                        count = T.meta_var(span[3])
                        base = T.meta_var(span[4])
                        split: T.let[T.int32] = by // (kv_heads * tiles)
                        kv_head: T.let[T.int32] = by % (kv_heads * tiles) // tiles
                        head: T.let[T.int32] = kv_head * group + by % tiles * own
                        begin: T.let[T.int32] = page_table_indptr[bx]
                        span[3] = page_table_indptr[bx + 1] - begin
                        length: T.let[T.int32] = T.if_then_else(count > 0, (count - 1) * _PAGE + length_info[bx], 0)
                        position: T.let[T.int32] = q_rope_position[bx]
                        back: T.let[T.int32] = position - k_rope_pos_offset[bx]
                        span[0] = first_key(sm_scale, position, back)
                        span[2] = T.truncdiv(T.max(count - first // _PAGE, 0) + splits - 1, splits) * _PAGE
                        span[1] = first // _PAGE * _PAGE + split * end
                        span[2] = T.min(start + end, length)
                        origin: T.let[T.int32] = T.cast(pages_elem_offset, "int32") // 4
                        flat = T.decl_buffer((max_num_pages * (2 * kv_heads * _PAGE * dim),), dtype, data=pages.data)
                        lane: T.let[T.int32] = tx % _LANES
                        slot: T.let[T.int32] = tx // _LANES
                        column: T.let[T.int32] = T.min(tx % columns, columns - 1)
                        turn: T.let[T.int32] = tx // columns
                        for i in range((own * padded + _THREADS - 1) // _THREADS):
                            at: T.let[T.int32] = i * _THREADS + tx
                            if at < own * padded:
                                number = T.meta_var(
                                    Q[bx, T.min(head + at // padded, heads - 1), T.min(at % padded, dim - 1)]
                                )
                                scaled = T.meta_var(
                                    T.cast(number, "float32") * (T.abs(sm_scale) * T.float32(math.log2(math.e)))
                                )
                                query[at] = T.if_then_else(at % padded < dim, scaled, T.float32(0))
                        for g in T.unroll(own):
                            most[g] = T.float32(_NONE)
                            total[g] = T.float32(0)
                            sums[g] = T.Broadcast(T.float32(0), 4)
                        for n in range((T.max(end - start, 0) + (step - 1)) // step):
                            span[4] = start + n * step
                            T.tvm_storage_sync("shared")
                            if tx < step // _PAGE:
                                places[tx] = page_table_values[begin + T.min(base // _PAGE + tx, count - 1)] * (
                                    2 * kv_heads * _PAGE * columns
                                ) + kv_head * (_PAGE * columns)
                            T.tvm_storage_sync("shared")
                            for j in T.unroll(own * each):
                                part[j] = T.float32(0)
                            for i in range(across // pair):
                                for u in T.unroll(pair):
                                    for j in T.unroll(each):
                                        keys[u * each + j] = vector(
                                            flat,
                                            place(origin, places, end - base, slot + j * (_THREADS // _LANES))
                                            + T.min(lane + (i * pair + u) * _LANES, columns - 1) * 4,
                                        ).astype("float32x4")
                                for u in T.unroll(pair):
                                    for g in T.unroll(own):
                                        factor[0] = vector(query, g * padded + (lane + (i * pair + u) * _LANES) * 4)
                                        for j in T.unroll(each):
                                            for d in T.unroll(4):
                                                part[g * each + j] = part[g * each + j] + T.Shuffle(
                                                    [keys[u * each + j]], [d]
                                                ) * T.Shuffle([factor[0]], [d])
                            for g in T.unroll(own):
                                for j in T.unroll(each):
                                    at = T.meta_var((g * _LANES + lane) * step + slot + j * (_THREADS // _LANES))
                                    exchange[at] = part[g * each + j]
                            T.tvm_storage_sync("shared")
                            seen = T.meta_var(T.And(base + tx < end, base + tx >= first))
                            if tx < step:
                                for g in T.unroll(own):
                                    one[0] = T.float32(0)
                                    for i in T.unroll(_LANES):
                                        one[0] = one[0] + exchange[(g * _LANES + i) * step + tx]
                                    value = T.meta_var(score(one[0], head + g, back - (base + tx)))
                                    scores[g * step + tx] = T.if_then_else(seen, value, T.float32(_NONE))
                            T.tvm_storage_sync("shared")
                            one[0] = T.float32(_NONE)
                            for i in T.unroll(length_of_segment):
                                one[0] = T.max(one[0], scores[tx * length_of_segment + i])
                            reduced[tx] = one[0]
                            T.tvm_storage_sync("shared")
                            for g in T.unroll(own):
                                one[0] = most[g]
                                for i in range(segments):
                                    one[0] = T.max(one[0], reduced[g * segments + i])
                                one[1] = T.exp2(most[g] - one[0])
                                most[g] = one[0]
                                total[g] = total[g] * one[1]
                                sums[g] = sums[g] * T.Broadcast(one[1], 4)
                                if tx < step:
                                    value = T.meta_var(T.exp2(scores[g * step + tx] - one[0]))
                                    one[2] = T.if_then_else(seen, value, T.float32(0))
                                    total[g] = total[g] + one[2]
                                    weights[g * step + tx] = one[2]
                            T.tvm_storage_sync("shared")
                            if turn < turns:
                                for i in range(rounds):
                                    for u in T.unroll(_VALUES):
                                        values[u] = vector(
                                            flat,
                                            place(origin, places, end - base, (i * _VALUES + u) * turns + turn)
                                            + (kv_heads * _PAGE * columns + column) * 4,
                                        ).astype("float32x4")
                                    for u in T.unroll(_VALUES):
                                        for g in T.unroll(own):
                                            share = T.meta_var(
                                                weight(weights, g * step, (i * _VALUES + u) * turns + turn)
                                            )
                                            sums[g] = sums[g] + T.Broadcast(share, 4) * values[u]
                        T.tvm_storage_sync("shared")
                        if turn < turns:
                            for g in T.unroll(own):
                                for d in T.unroll(4):
                                    exchange[(turn * own + g) * dim + column * 4 + d] = T.Shuffle([sums[g]], [d])
                        if tx < step:
                            for g in T.unroll(own):
                                scores[g * step + tx] = total[g]
                        T.tvm_storage_sync("shared")
                        one[0] = T.float32(0)
                        for i in T.unroll(length_of_segment):
                            one[0] = one[0] + scores[tx * length_of_segment + i]
                        reduced[tx] = one[0]
                        T.tvm_storage_sync("shared")
                        for g in T.unroll(own):
                            if by % tiles * own + g < group:
                                one[0] = T.float32(0)
                                for i in range(segments):
                                    one[0] = one[0] + reduced[g * segments + i]
                                one[1] = logarithm(most[g], one[0])
                                one[2] = with_sink(one[1], Q[bx, head + g, dim - 1], back < length)
                                one[3] = T.exp2(one[1] - one[2]) / T.max(one[0], T.float32(1e-30))
                                row: T.let[T.int32] = ((bx * splits + split) * heads + head + g) * size
                                for i in range((dim + _THREADS - 1) // _THREADS):
                                    at: T.let[T.int32] = i * _THREADS + tx
                                    if at < dim:
                                        part[0] = T.float32(0)
                                        for k in range(turns):
                                            part[0] = part[0] + exchange[(k * own + g) * dim + at]
                                        if splits == 1:
                                            output[bx, head + g, at] = T.cast(part[0] * one[3], dtype)
                                        else:
                                            parts[row + at] = part[0]
                                if tx == 0:
                                    if splits == 1:
                                        lse[bx, head + g] = one[2]
                                    else:
                                        parts[row + dim] = most[g]
                                        parts[row + dim + 1] = one[0]
        if T.tvm_thread_invariant(splits > 1):
            for bx in T.thread_binding(B, thread="blockIdx.x"):
                for by in T.thread_binding(heads, thread="blockIdx.y"):
                    for tx in T.thread_binding(columns, thread="threadIdx.x"):
                        with T.sblock("join"):
                            T.reads()
                            T.writes()
                            joined = T.sblock_alloc_buffer((1,), "float32x4", scope="local")
                            have = T.sblock_alloc_buffer((5,), "float32", scope="local")
                            length: T.let[T.int32] = (
                                page_table_indptr[bx + 1] - page_table_indptr[bx] - 1
                            ) * _PAGE + length_info[bx]
                            have[0] = T.float32(_NONE)
                            for i in range(splits):
                                have[0] = T.max(have[0], parts[((bx * splits + i) * heads + by) * size + dim])
                            have[1] = T.float32(0)
                            joined[0] = T.Broadcast(T.float32(0), 4)
                            for i in range(splits):
                                row: T.let[T.int32] = ((bx * splits + i) * heads + by) * size
                                have[2] = T.exp2(parts[row + dim] - have[0])
                                have[1] = have[1] + have[2] * parts[row + dim + 1]
                                joined[0] = joined[0] + T.Broadcast(have[2], 4) * parts[T.ramp(row + tx * 4, 1, 4)]
                            have[2] = logarithm(have[0], have[1])
                            back = T.meta_var(q_rope_position[bx] - k_rope_pos_offset[bx])
                            have[3] = with_sink(have[2], Q[bx, by, dim - 1], back < length)
                            have[4] = T.exp2(have[2] - have[3]) / T.max(have[1], T.float32(1e-30))
                            for d in T.unroll(4):
                                output[bx, by, tx * 4 + d] = T.cast(T.Shuffle([joined[0]], [d]) * have[4], dtype)
                            if tx == 0:
                                lse[bx, by] = have[3]

    return attention_decode


def _each(own: int) -> int:
    """Keys of a thread in a step: with `own` query heads it has no more than 16 scores, in registers."""
    return min(_KEYS, 16 // own)


def _exchange(own: int, dim: int) -> int:
    """Numbers that threads tell each other: of scores while there are keys left, then of what they have of values."""
    return max(_THREADS * _each(own) * own, _THREADS // (dim // 4) * own * dim)


def _shared_bytes(own: int, dim: int) -> int:
    step = _THREADS // _LANES * _each(own)
    return 4 * (own * (-(-dim // 16) * 16 + 2 * step) + _exchange(own, dim) + _THREADS + step // _PAGE)
