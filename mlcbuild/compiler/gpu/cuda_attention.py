"""Attention of one new token of each sequence on CUDA devices: the functions of kernels/decode_attention.cuh.

The keys of a sequence are split into parts where there are too few sequences and heads to keep a device busy; a second
kernel joins them. How many parts is a matter of the call: of its sequences, and of the pages that they have in all.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from mlcbuild.compiler.gpu.cuda_rows import TYPES
from mlcbuild.models.structure import Structure

PAGE = 16  # tokens
WARPS = 4  # of a block, each with a page at a time
THREADS = 128  # of a block that joins parts
_SHARING = 8  # query heads of a block
_BLOCKS = 4 * 132  # that the largest device (H100) shall have
_PAGES = 2 * WARPS  # of a part at least: for its loads to be on their way before they are used


def decode(structure: Structure, dtype: str) -> Any:
    """TVM's `attention_decode` for the structure's heads in `dtype`; None where no function of ours takes them."""
    s = structure
    heads, kv_heads, dim = s.num_attention_heads, s.num_key_value_heads, s.head_dim
    if dtype not in ("float16", "bfloat16") or dim % 8:
        return None
    sinks = str("sinks" in s.roles()).lower()
    kind, window, chunked = TYPES[dtype], s.sliding_window_size or 0, str(s.chunked).lower()
    attend = f"mlcbuild::decode_attention<{kind}, {dim}, {heads}, {kv_heads}, {WARPS}, {window}, {chunked}, {sinks}>"
    join = f"mlcbuild::join_parts<{kind}, {dim}, {heads}, {sinks}>"
    cap, bias = float(s.attn_logit_softcapping or 0), float(s.alibi_bias_max or 0)
    tiles = kv_heads * -(-(heads // kv_heads) // _SHARING)
    shared_floats, joining = WARPS * _SHARING * (dim + 2), -(-heads * dim // THREADS)

    @T.prim_func(s_tir=True, private=True)
    def attention_decode(
        q: T.handle,
        pages_: T.handle,
        starts_: T.handle,
        numbers_: T.handle,
        lengths_: T.handle,
        offsets_: T.handle,
        positions_: T.handle,
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
        page_table_indptr = T.match_buffer(starts_, (B + 1,), "int32", elem_offset=page_indptr_elem_offset)
        page_table_values = T.match_buffer(numbers_, (nnz_pages,), "int32", elem_offset=page_values_elem_offset)
        length_info = T.match_buffer(lengths_, (B,), "int32", elem_offset=length_info_elem_offset)
        k_rope_pos_offset = T.match_buffer(offsets_, (B,), "int32", elem_offset=k_rope_pos_offset_elem_offset)
        q_rope_position = T.match_buffer(positions_, (B,), "int32", elem_offset=q_rope_position_elem_offset)
        output = T.match_buffer(out, (B, heads, dim), dtype)
        lse = T.match_buffer(lse_, (B, heads), "float32")
        splits = T.meta_var(T.max(1, T.min((_BLOCKS + B * tiles - 1) // (B * tiles), nnz_pages // _PAGES)))
        parts = T.sblock_alloc_buffer((B * splits * heads * dim,), "float32")
        sums = T.sblock_alloc_buffer((B * splits * heads * 2,), "float32")
        for bx in T.thread_binding(B, thread="blockIdx.x"):
            for by in T.thread_binding(tiles, thread="blockIdx.y"):
                for bz in T.thread_binding(splits, thread="blockIdx.z"):
                    for _tx in T.thread_binding(32 * WARPS, thread="threadIdx.x"):
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
                                    splits,
                                    bx,
                                    by,
                                    bz,
                                )
                            )
        if splits > 1:
            for bx in T.thread_binding(B, thread="blockIdx.x"):
                for by in T.thread_binding(joining, thread="blockIdx.y"):
                    for tx in T.thread_binding(THREADS, thread="threadIdx.x"):
                        with T.sblock("join"):
                            T.reads()
                            T.writes()
                            T.evaluate(
                                T.call_extern(
                                    "void",
                                    join,
                                    output.data,
                                    lse.data,
                                    parts.data,
                                    sums.data,
                                    Q.data,
                                    T.address_of(page_table_indptr[0]),
                                    T.address_of(length_info[0]),
                                    T.address_of(k_rope_pos_offset[0]),
                                    T.address_of(q_rope_position[0]),
                                    splits,
                                    bx,
                                    by * THREADS + tx,
                                )
                            )

    return attention_decode
