"""`create_tir_paged_kv_cache` of a CPU library: our own attention kernels, made for the runtime's page size of 16."""

from __future__ import annotations

from tvm import relax, tirx
from tvm.relax.frontend.nn.llm import kv_cache as tvm_kv_cache

from mlcbuild.compiler.abi import kv_cache
from mlcbuild.compiler.abi.kv_cache import Kernels
from mlcbuild.compiler.cpu import attention, rows
from mlcbuild.models.rope import Rotary
from mlcbuild.models.structure import Structure


def emit_create(builder: relax.BlockBuilder, structure: Structure, dtype: str) -> None:
    """Add the function, as contract/kv_cache.py describes it."""
    s = structure
    heads, kv_heads, dim = s.num_attention_heads, s.num_key_value_heads, s.head_dim
    limits = s.sliding_window_size or 0, s.attn_logit_softcapping or 0.0, s.alibi_bias_max or 0.0
    shape = attention.Shape(heads, kv_heads, dim, dtype, *limits)

    def kernels(page_size: tirx.Var, rotary: Rotary) -> Kernels:
        return Kernels(
            ragged=attention.ragged(shape),
            prefill=attention.prefill(shape),
            decode=attention.decode(shape),
            merge=attention.merge(dtype),
            split_rotary=rows.split_rotary(rows.Heads(heads, kv_heads, dim, dtype), rotary),
            copy_single_page=tvm_kv_cache._copy_single_page_cpu(kv_heads, page_size, dim, dtype),
            compact=tvm_kv_cache._compact_kv_copy_cpu(kv_heads, dim, dtype),
        )

    kv_cache.emit_create(builder, structure, dtype, kernels)
