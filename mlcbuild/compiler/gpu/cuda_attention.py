"""Attention on CUDA devices: TIR around the functions of kernels/decode_attention.cuh and prefill_attention.cuh.

The arguments are those that TVM's KV cache gives its kernels. At decode the keys of a sequence are split into parts
where there are too few sequences and heads to keep a device busy, and the block that ends last joins them. How many is
a matter of the call: of its sequences, and of the pages that they have in all.
"""

from __future__ import annotations

from typing import Any

from tvm import IRModule, s_tir, tirx
from tvm.script import tirx as T

from mlcbuild.compiler.gpu.cuda_rows import COUNTS, TYPES
from mlcbuild.compiler.gpu.rewriting import arguments, mapped
from mlcbuild.models.structure import Structure

PAGE = 16  # tokens
WARPS = 4  # of a block
_THREADS = 32 * WARPS
_SPREAD = 64  # of a block of rotary embedding, for one row to have blocks on most of a device
SHARING = 8  # rows of a tile
BLOCKS = 4 * 132  # that the largest device (H100) shall have
PAGES = 2 * WARPS  # of a part, on the average of all sequences: for loads to be on their way before they are used
_WIDEST = 512  # numbers of a value that the registers of two warps and the shared memory of a block hold
_COLUMNS = 256  # of values that a warp sums: of wider heads, two warps share rows
_NARROW = 128  # head_dim up to which a thread's registers hold two tiles


def takes(structure: Structure, dtype: str) -> bool:
    """Whether there are functions for the structure's heads in the model dtype."""
    *_, dim, summed = _sizes(structure)
    return dtype in ("float16", "bfloat16") and dim % 8 == 0 and summed <= _WIDEST


def decode(structure: Structure, dtype: str) -> Any:
    """`attention_decode`: one new token of each sequence over its cached pages."""
    heads, kv_heads, dim = structure.cache_heads
    of_queries, _, width, summed = _sizes(structure)
    kind, seen, cap, bias = TYPES[dtype], *_seen(structure)
    attend = f"mlcbuild::decode_attention<{kind}, {width}, {of_queries}, {kv_heads}, {WARPS}, {BLOCKS}, {seen}>"
    tiles = kv_heads * -(-(of_queries // kv_heads) // SHARING)
    shared_floats = WARPS // _sharing(summed) * SHARING * (summed + 2)

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
        T.func_attr({"tirx.is_scheduled": True})
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
        pages = T.match_buffer(pages_, (max_num_pages, 2, kv_heads, PAGE, dim), dtype, elem_offset=pages_elem_offset)
        page_table_indptr = T.match_buffer(starts, (B + 1,), "int32", elem_offset=page_indptr_elem_offset)
        page_table_values = T.match_buffer(numbers, (nnz_pages,), "int32", elem_offset=page_values_elem_offset)
        length_info = T.match_buffer(lengths, (B,), "int32", elem_offset=length_info_elem_offset)
        k_rope_pos_offset = T.match_buffer(offsets, (B,), "int32", elem_offset=k_rope_pos_offset_elem_offset)
        q_rope_position = T.match_buffer(positions, (B,), "int32", elem_offset=q_rope_position_elem_offset)
        output = T.match_buffer(out, (B, heads, dim), dtype)
        lse = T.match_buffer(lse_, (B, heads), "float32")
        splits = T.meta_var(T.max(1, T.min((BLOCKS + B * tiles - 1) // (B * tiles), nnz_pages // (PAGES * B))))
        parts = T.sblock_alloc_buffer((B * splits * of_queries * summed,), "float32")
        sums = T.sblock_alloc_buffer((B * splits * of_queries * 2,), "float32")
        T.evaluate(parts.data)  # named on the host, which is to allocate them
        T.evaluate(sums.data)
        for bx in T.thread_binding(B, thread="blockIdx.x"):
            for by in T.thread_binding(tiles, thread="blockIdx.y"):
                for bz in T.thread_binding(splits, thread="blockIdx.z"):
                    for _tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                        with T.sblock("attend"):
                            T.reads()
                            T.writes()
                            shared = T.sblock_alloc_buffer((shared_floats,), "float32", scope="shared")
                            T.evaluate(
                                T.call_extern(
                                    "void",
                                    attend,
                                    shared.data,
                                    output.data,
                                    lse.data,
                                    parts.data,
                                    sums.data,
                                    Q.data,
                                    T.address_of(pages[0, 0, 0, 0, 0]),
                                    T.address_of(page_table_indptr[0]),
                                    T.address_of(page_table_values[0]),
                                    T.address_of(length_info[0]),
                                    T.address_of(k_rope_pos_offset[0]),
                                    T.address_of(q_rope_position[0]),
                                    sm_scale,
                                    T.float32(cap),
                                    T.float32(bias),
                                    B,
                                    splits,
                                    bx,
                                    by,
                                    bz,
                                )
                            )

    return attention_decode


def keeping(rotary: Any) -> Any:
    """`split_rotary`, after which `attention_decode` knows where the new keys and values are.

    Of few rows, it asks for a part of the next product's matrix too (kernels/prefetch.cuh).
    """
    given = arguments(rotary)
    places = [given[name].data for name in ("k", "v")]
    ask = tirx.Evaluate(tirx.call_extern("void", "mlcbuild::prefetch_second"))
    keep = tirx.Evaluate(tirx.call_extern("void", "mlcbuild::keep_new", *places))

    def kept(block: Any) -> Any:
        if block.name_hint != "rope":
            return block
        first = tirx.all(*(axis.var == 0 for axis in block.iter_vars))
        more = tirx.IfThenElse(given["q"].shape[0] <= COUNTS[-1], ask, None)
        body = tirx.SeqStmt([block.body, tirx.IfThenElse(first, keep, None), more])
        return s_tir.SBlock(block.iter_vars, block.reads, block.writes, block.name_hint, body)

    module = IRModule({"main": rotary.with_body(mapped(rotary.body, s_tir.SBlock, kept))})
    sch = s_tir.Schedule(tirx.transform.ForceNarrowIndexToInt32()(module))
    parts = sch.split(sch.fuse(*sch.get_loops(sch.get_sblock("rope"))), [None, _SPREAD])
    for loop, axis in zip(parts, ("blockIdx.x", "threadIdx.x"), strict=True):
        sch.bind(loop, axis)
    return sch.mod["main"].with_attr("tirx.is_scheduled", True)


def append(structure: Structure, dtype: str) -> Any:
    """`kv_cache_transpose_append`: new tokens to their places in the pages.

    A single one is left to `attention_decode`: the runtime of the KV cache has that follow wherever each text has one
    new token (TVM's paged_kv_cache.cc: `is_decode_request_`, and no fewer pages than 32 texts would share).
    """
    _, kv_heads, dim = structure.cache_heads
    size = kv_heads * dim

    @T.prim_func(s_tir=True, private=True)
    def kv_cache_transpose_append(pages_: T.handle, k_: T.handle, v_: T.handle, places_: T.handle):
        T.func_attr({"tirx.is_scheduled": True})
        n = T.int32()
        num_pages = T.int32()
        pages_elem_offset = T.int64()
        places_elem_offset = T.int32()
        pages = T.match_buffer(pages_, (num_pages, 2, kv_heads, PAGE, dim), dtype, elem_offset=pages_elem_offset)
        k = T.match_buffer(k_, (n, kv_heads, dim), dtype)
        v = T.match_buffer(v_, (n, kv_heads, dim), dtype)
        places = T.match_buffer(places_, (n,), "int32", elem_offset=places_elem_offset)
        if n > 1:
            for bx in T.thread_binding(n, thread="blockIdx.x"):
                for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with T.sblock("append"):
                        T.reads()
                        T.writes()
                        place: T.let[T.int32] = places[bx]
                        for i in T.serial((size + _THREADS - 1) // _THREADS):
                            at: T.let[T.int32] = i * _THREADS + tx
                            if at < size and place >= 0:
                                pages[place // PAGE, 0, at // dim, place % PAGE, at % dim] = k[bx, at // dim, at % dim]
                                pages[place // PAGE, 1, at // dim, place % PAGE, at % dim] = v[bx, at // dim, at % dim]

    return kv_cache_transpose_append


def prefill(structure: Structure, dtype: str) -> Any:
    """`attention_prefill`: new tokens over their sequence's cached pages."""
    heads, kv_heads, dim = structure.cache_heads
    group, rows, attend, cap, bias = _many("prefill_attention", structure, dtype)

    @T.prim_func(s_tir=True, private=True)
    def attention_prefill(
        q_: T.handle,
        starts: T.handle,
        pages_: T.handle,
        page_starts: T.handle,
        numbers: T.handle,
        lengths: T.handle,
        offsets: T.handle,
        positions: T.handle,
        out: T.handle,
        lse_: T.handle,
        causal: T.int32,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True})
        batch_size = T.int32()
        total_len = T.int32()
        nnz_pages = T.int32()
        max_num_pages = T.int32()
        pages_elem_offset = T.int64()
        q_indptr_elem_offset = T.int32()
        page_indptr_elem_offset = T.int32()
        page_values_elem_offset = T.int32()
        k_rope_pos_offset_elem_offset = T.int32()
        q_rope_position_elem_offset = T.int32()
        length_info_elem_offset = T.int32()
        q = T.match_buffer(q_, (total_len, heads, dim), dtype)
        q_indptr = T.match_buffer(starts, (batch_size + 1,), "int32", elem_offset=q_indptr_elem_offset)
        pages = T.match_buffer(pages_, (max_num_pages, 2, kv_heads, PAGE, dim), dtype, elem_offset=pages_elem_offset)
        page_indptr = T.match_buffer(page_starts, (batch_size + 1,), "int32", elem_offset=page_indptr_elem_offset)
        page_values = T.match_buffer(numbers, (nnz_pages,), "int32", elem_offset=page_values_elem_offset)
        length_info = T.match_buffer(lengths, (batch_size,), "int32", elem_offset=length_info_elem_offset)
        k_rope_pos_offset = T.match_buffer(offsets, (batch_size,), "int32", elem_offset=k_rope_pos_offset_elem_offset)
        q_rope_position = T.match_buffer(positions, (total_len,), "int32", elem_offset=q_rope_position_elem_offset)
        output = T.match_buffer(out, (total_len, heads, dim), dtype)
        lse = T.match_buffer(lse_, (total_len, heads), "float32")
        for bx in T.thread_binding(total_len * group // rows + batch_size, thread="blockIdx.x"):
            for by in T.thread_binding(kv_heads, thread="blockIdx.y"):
                for _tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with T.sblock("attend"):
                        T.reads()
                        T.writes()
                        T.evaluate(
                            T.call_extern(
                                "void",
                                attend,
                                output.data,
                                lse.data,
                                q.data,
                                T.address_of(q_indptr[0]),
                                T.address_of(pages[0, 0, 0, 0, 0]),
                                T.address_of(page_indptr[0]),
                                T.address_of(page_values[0]),
                                T.address_of(length_info[0]),
                                T.address_of(k_rope_pos_offset[0]),
                                T.address_of(q_rope_position[0]),
                                causal,
                                sm_scale,
                                T.float32(cap),
                                T.float32(bias),
                                batch_size,
                                bx,
                                by,
                            )
                        )

    return attention_prefill


def ragged(structure: Structure, dtype: str) -> Any:
    """`attention_prefill_ragged`: new tokens of several sequences, each over those of its own."""
    heads, kv_heads, dim = structure.cache_heads
    group, rows, attend, cap, bias = _many("new_tokens_attention", structure, dtype)

    @T.prim_func(s_tir=True, private=True)
    def attention_prefill_ragged(
        q_: T.handle,
        starts: T.handle,
        k_: T.handle,
        v_: T.handle,
        key_starts: T.handle,
        positions: T.handle,
        offsets: T.handle,
        out: T.handle,
        lse_: T.handle,
        causal: T.int32,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True})
        batch_size = T.int32()
        qo_len = T.int32()
        kv_len = T.int32()
        q_indptr_elem_offset = T.int32()
        kv_indptr_elem_offset = T.int32()
        q_rope_position_elem_offset = T.int32()
        k_rope_pos_offset_elem_offset = T.int32()
        q = T.match_buffer(q_, (qo_len, heads, dim), dtype)
        q_indptr = T.match_buffer(starts, (batch_size + 1,), "int32", elem_offset=q_indptr_elem_offset)
        k = T.match_buffer(k_, (kv_len, kv_heads, dim), dtype)
        v = T.match_buffer(v_, (kv_len, kv_heads, dim), dtype)
        kv_indptr = T.match_buffer(key_starts, (batch_size + 1,), "int32", elem_offset=kv_indptr_elem_offset)
        q_rope_position = T.match_buffer(positions, (qo_len,), "int32", elem_offset=q_rope_position_elem_offset)
        T.match_buffer(offsets, (batch_size,), "int32", elem_offset=k_rope_pos_offset_elem_offset)
        output = T.match_buffer(out, (qo_len, heads, dim), dtype)
        lse = T.match_buffer(lse_, (qo_len, heads), "float32")
        for bx in T.thread_binding(qo_len * group // rows + batch_size, thread="blockIdx.x"):
            for by in T.thread_binding(kv_heads, thread="blockIdx.y"):
                for _tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with T.sblock("attend"):
                        T.reads()
                        T.writes()
                        T.evaluate(
                            T.call_extern(
                                "void",
                                attend,
                                output.data,
                                lse.data,
                                q.data,
                                T.address_of(q_indptr[0]),
                                k.data,
                                v.data,
                                T.address_of(kv_indptr[0]),
                                T.address_of(q_rope_position[0]),
                                causal,
                                sm_scale,
                                T.float32(cap),
                                T.float32(bias),
                                batch_size,
                                bx,
                                by,
                            )
                        )

    return attention_prefill_ragged


def _many(function: str, structure: Structure, dtype: str) -> tuple[int, int, str, float, float]:
    """Query heads of a key head, rows of a block, the function's name, cap and bias."""
    heads, kv_heads, width, summed = _sizes(structure)
    tiles = 2 if width <= _NARROW else 1
    seen, cap, bias = _seen(structure)
    name = f"mlcbuild::{function}<{TYPES[dtype]}, {width}, {heads}, {kv_heads}, {WARPS}, {tiles}, {seen}>"
    return heads // kv_heads, WARPS // _sharing(summed) * tiles * SHARING, name, cap, bias


def _sharing(summed: int) -> int:
    """Warps that share rows."""
    return -(-summed // _COLUMNS)


def _sizes(structure: Structure) -> tuple[int, int, int, int]:
    """Heads of queries and of keys, the numbers of a key, and those of a value that are summed (SUMS in C++)."""
    s, (_, kv_heads, dim) = structure, structure.cache_heads
    width, summed = (2 * dim, -(-s.kv_lora_rank // 8) * 8) if s.absorbed else (dim, dim)
    return s.num_attention_heads, kv_heads, width, summed


def _seen(structure: Structure) -> tuple[str, float, float]:
    """Which keys a row sees, as template arguments, and what a row of latents has for its value; the soft cap and the
    largest exponent of linear biases, or 0."""
    s, sinks = structure, str("sinks" in structure.roles()).lower()
    seen = f"{s.sliding_window_size or 0}, {str(s.chunked).lower()}, {sinks}"
    seen += f", {s.kv_lora_rank}" if s.absorbed else ""
    return seen, float(s.attn_logit_softcapping or 0), float(s.alibi_bias_max or 0)
