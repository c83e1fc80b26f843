"""Attention on the CPU: the TIR functions that the paged KV cache calls, around the kernels of kernels/attention.c.

Argument lists are those of the KV cache in apache-tvm (src/runtime/vm/attn_backend.h). Rotary embedding is applied
before the cache (RopeMode.NORMAL), so the rope arguments are not used here.
"""

from __future__ import annotations

import functools
from typing import Any

from tvm.script import tirx as T

PAGE_SIZE = 16
QUERIES = 48  # query rows times the heads that share a key, in one task; likewise in attention.c
_PAGED, _MERGE = "mlcbuild_attention_paged", "mlcbuild_attention_merge"
_SERIAL_MERGES = 64  # of one head each


@functools.cache
def ragged(heads: int, kv_heads: int, dim: int, dtype: str) -> Any:
    """Attention of new tokens among themselves."""
    block = max(1, QUERIES * kv_heads // heads)

    @T.prim_func(s_tir=True, private=True)
    def attention_prefill_ragged(
        var_q: T.handle, var_q_indptr: T.handle, var_k: T.handle, var_v: T.handle, var_kv_indptr: T.handle,
        var_q_rope_position: T.handle, var_k_rope_pos_offset: T.handle, var_output: T.handle, var_lse: T.handle,
        causal: T.int32, rotary_mode: T.int32, rope_scale: T.float32, rope_theta: T.float32, sm_scale: T.float32,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True})
        n = T.int64()
        kv = T.int64()
        b = T.int64()
        q_offset = T.int64()
        kv_offset = T.int64()
        q_rope_offset = T.int64()
        k_rope_offset = T.int64()
        q = T.match_buffer(var_q, (n, heads, dim), dtype)
        q_indptr = T.match_buffer(var_q_indptr, (b + 1,), "int32", elem_offset=q_offset)
        k = T.match_buffer(var_k, (kv, kv_heads, dim), dtype)
        v = T.match_buffer(var_v, (kv, kv_heads, dim), dtype)
        kv_indptr = T.match_buffer(var_kv_indptr, (b + 1,), "int32", elem_offset=kv_offset)
        q_rope_position = T.match_buffer(var_q_rope_position, (n,), "int32", elem_offset=q_rope_offset)
        k_rope_pos_offset = T.match_buffer(var_k_rope_pos_offset, (b,), "int32", elem_offset=k_rope_offset)
        output = T.match_buffer(var_output, (n, heads, dim), dtype)
        lse = T.match_buffer(var_lse, (n, heads), "float32")
        with T.sblock("attention"):
            T.reads(
                q[0:n, 0:heads, 0:dim], q_indptr[0 : b + 1], k[0:kv, 0:kv_heads, 0:dim], v[0:kv, 0:kv_heads, 0:dim],
                kv_indptr[0 : b + 1], q_rope_position[0:n], k_rope_pos_offset[0:b],
            )  # fmt: skip
            T.writes(output[0:n, 0:heads, 0:dim], lse[0:n, 0:heads])
            for task in T.parallel((n + block - 1) // block * kv_heads):
                T.evaluate(
                    T.call_extern(
                        "void", "mlcbuild_attention_ragged", q.data, T.address_of(q_indptr[0]), k.data, v.data,
                        T.address_of(kv_indptr[0]), output.data, lse.data, n, T.int64(heads), T.int64(kv_heads),
                        T.int64(dim), T.int64(block), task, causal, sm_scale,
                    )
                )  # fmt: skip

    return attention_prefill_ragged


@functools.cache
def prefill(heads: int, kv_heads: int, dim: int, dtype: str, sliding_window_size: int) -> Any:
    """Attention of new tokens over cached pages; `sliding_window_size` 0 is the function for full attention."""
    block = max(1, QUERIES * kv_heads // heads)
    sliding = sliding_window_size > 0
    rows = 3 if sliding else 1

    @T.prim_func(s_tir=True, private=True)
    def attention_prefill(
        var_q: T.handle, var_q_indptr: T.handle, var_pages: T.handle, var_page_indptr: T.handle,
        var_page_values: T.handle, var_length_info: T.handle, var_k_rope_pos_offset: T.handle,
        var_q_rope_position: T.handle, var_output: T.handle, var_lse: T.handle,
        causal: T.int32, rotary_mode: T.int32, rope_scale: T.float32, rope_theta: T.float32, sm_scale: T.float32,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True})
        n = T.int64()
        b = T.int64()
        page_count = T.int64()
        held = T.int64()
        q_offset = T.int64()
        indptr_offset = T.int64()
        values_offset = T.int64()
        info_offset = T.int64()
        q_rope_offset = T.int64()
        k_rope_offset = T.int64()
        q = T.match_buffer(var_q, (n, heads, dim), dtype)
        q_indptr = T.match_buffer(var_q_indptr, (b + 1,), "int32", elem_offset=q_offset)
        pages = T.match_buffer(var_pages, (page_count, 2, kv_heads, PAGE_SIZE, dim), dtype)
        page_indptr = T.match_buffer(var_page_indptr, (b + 1,), "int32", elem_offset=indptr_offset)
        page_values = T.match_buffer(var_page_values, (held,), "int32", elem_offset=values_offset)
        info = T.match_buffer(var_length_info, (rows, b) if sliding else (b,), "int32", elem_offset=info_offset)
        k_rope_pos_offset = T.match_buffer(var_k_rope_pos_offset, (b,), "int32", elem_offset=k_rope_offset)
        q_rope_position = T.match_buffer(var_q_rope_position, (n,), "int32", elem_offset=q_rope_offset)
        output = T.match_buffer(var_output, (n, heads, dim), dtype)
        lse = T.match_buffer(var_lse, (n, heads), "float32")
        with T.sblock("attention"):
            T.reads(
                q[0:n, 0:heads, 0:dim], q_indptr[0 : b + 1], pages[0:page_count, 0:2, 0:kv_heads, 0:PAGE_SIZE, 0:dim],
                page_indptr[0 : b + 1], page_values[0:held], k_rope_pos_offset[0:b], q_rope_position[0:n],
            )  # fmt: skip
            T.writes(output[0:n, 0:heads, 0:dim], lse[0:n, 0:heads])
            for task in T.parallel((n + block - 1) // block * kv_heads):
                if sliding:
                    T.evaluate(
                        T.call_extern(
                            "void", _PAGED, q.data, T.address_of(q_indptr[0]), pages.data, T.address_of(page_indptr[0]),
                            T.address_of(page_values[0]), T.address_of(info[0, 0]), T.address_of(info[1, 0]),
                            T.address_of(info[2, 0]), output.data, lse.data, n, T.int64(heads), T.int64(kv_heads),
                            T.int64(dim), T.int64(PAGE_SIZE), T.int64(block), task, causal,
                            T.int64(sliding_window_size), sm_scale,
                        )
                    )  # fmt: skip
                else:
                    T.evaluate(
                        T.call_extern(
                            "void", _PAGED, q.data, T.address_of(q_indptr[0]), pages.data, T.address_of(page_indptr[0]),
                            T.address_of(page_values[0]), T.address_of(info[0]), T.int64(0), T.int64(0), output.data,
                            lse.data, n, T.int64(heads), T.int64(kv_heads), T.int64(dim), T.int64(PAGE_SIZE),
                            T.int64(block), task, causal, T.int64(0), sm_scale,
                        )
                    )  # fmt: skip

    return attention_prefill


@functools.cache
def decode(heads: int, kv_heads: int, dim: int, dtype: str, sliding: bool) -> Any:
    """Attention of one new token per sequence over cached pages."""

    @T.prim_func(s_tir=True, private=True)
    def attention_decode(
        var_q: T.handle, var_pages: T.handle, var_page_indptr: T.handle, var_page_values: T.handle,
        var_length_info: T.handle, var_k_rope_pos_offset: T.handle, var_q_rope_position: T.handle,
        var_output: T.handle, var_lse: T.handle,
        rotary_mode: T.int32, rope_scale: T.float32, rope_theta: T.float32, sm_scale: T.float32,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True})
        b = T.int64()
        page_count = T.int64()
        held = T.int64()
        indptr_offset = T.int64()
        values_offset = T.int64()
        info_offset = T.int64()
        q_rope_offset = T.int64()
        k_rope_offset = T.int64()
        q = T.match_buffer(var_q, (b, heads, dim), dtype)
        pages = T.match_buffer(var_pages, (page_count, 2, kv_heads, PAGE_SIZE, dim), dtype)
        page_indptr = T.match_buffer(var_page_indptr, (b + 1,), "int32", elem_offset=indptr_offset)
        page_values = T.match_buffer(var_page_values, (held,), "int32", elem_offset=values_offset)
        info = T.match_buffer(var_length_info, (3, b) if sliding else (b,), "int32", elem_offset=info_offset)
        k_rope_pos_offset = T.match_buffer(var_k_rope_pos_offset, (b,), "int32", elem_offset=k_rope_offset)
        q_rope_position = T.match_buffer(var_q_rope_position, (b,), "int32", elem_offset=q_rope_offset)
        output = T.match_buffer(var_output, (b, heads, dim), dtype)
        lse = T.match_buffer(var_lse, (b, heads), "float32")
        with T.sblock("attention"):
            T.reads(
                q[0:b, 0:heads, 0:dim], pages[0:page_count, 0:2, 0:kv_heads, 0:PAGE_SIZE, 0:dim],
                page_indptr[0 : b + 1], page_values[0:held], k_rope_pos_offset[0:b], q_rope_position[0:b],
            )  # fmt: skip
            T.writes(output[0:b, 0:heads, 0:dim], lse[0:b, 0:heads])
            for task in T.parallel(b * kv_heads):
                if sliding:
                    T.evaluate(
                        T.call_extern(
                            "void", _PAGED, q.data, T.int64(0), pages.data, T.address_of(page_indptr[0]),
                            T.address_of(page_values[0]), T.address_of(info[0, 0]), T.address_of(info[1, 0]),
                            T.address_of(info[2, 0]), output.data, lse.data, b, T.int64(heads), T.int64(kv_heads),
                            T.int64(dim), T.int64(PAGE_SIZE), T.int64(1), task, T.int32(0), T.int64(0), sm_scale,
                        )
                    )  # fmt: skip
                else:
                    T.evaluate(
                        T.call_extern(
                            "void", _PAGED, q.data, T.int64(0), pages.data, T.address_of(page_indptr[0]),
                            T.address_of(page_values[0]), T.address_of(info[0]), T.int64(0), T.int64(0), output.data,
                            lse.data, b, T.int64(heads), T.int64(kv_heads), T.int64(dim), T.int64(PAGE_SIZE),
                            T.int64(1), task,
                            T.int32(0), T.int64(0), sm_scale,
                        )
                    )  # fmt: skip

    return attention_decode


@functools.cache
def merge(dtype: str) -> Any:
    """Two attentions over different keys into one, in place: v [n, heads, dim], s [n, heads]."""

    @T.prim_func(s_tir=True, private=True)
    def attention_merge(var_v: T.handle, var_s: T.handle, var_v_other: T.handle, var_s_other: T.handle):
        T.func_attr({"tirx.is_scheduled": True})
        n = T.int64()
        heads = T.int64()
        dim = T.int64()
        v = T.match_buffer(var_v, (n, heads, dim), dtype)
        s = T.match_buffer(var_s, (n, heads), "float32")
        v_other = T.match_buffer(var_v_other, (n, heads, dim), dtype)
        s_other = T.match_buffer(var_s_other, (n, heads), "float32")
        with T.sblock("merge"):
            T.reads(v[0:n, 0:heads, 0:dim], s[0:n, 0:heads], v_other[0:n, 0:heads, 0:dim], s_other[0:n, 0:heads])
            T.writes(v[0:n, 0:heads, 0:dim], s[0:n, 0:heads])
            if n * heads <= _SERIAL_MERGES:
                for task in T.serial(n * heads):
                    T.evaluate(T.call_extern("void", _MERGE, v.data, s.data, v_other.data, s_other.data, dim, task))
            else:
                for task in T.parallel(n * heads):
                    T.evaluate(T.call_extern("void", _MERGE, v.data, s.data, v_other.data, s_other.data, dim, task))

    return attention_merge
