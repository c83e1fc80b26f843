"""`create_tir_paged_kv_cache` of a GPU library: TVM's paged KV cache with its attention kernels in it."""

from __future__ import annotations

from tvm import relax, target, tirx
from tvm.relax.frontend.nn.llm import kv_cache as tvm_kv_cache

from mlcbuild.compiler.abi import kv_cache
from mlcbuild.compiler.abi.kv_cache import Kernels
from mlcbuild.compiler.gpu import attention
from mlcbuild.compiler.gpu.rope import split_rotary
from mlcbuild.compiler.gpu.script import quick
from mlcbuild.errors import MlcBuildError
from mlcbuild.models.rope import Rotary
from mlcbuild.models.structure import Structure


def check(structure: Structure) -> None:
    """Raise MlcBuildError, naming it, for a choice that TVM's GPU kernels do not have."""
    s = structure
    if s.head_dim % 4 or not 32 <= s.head_dim <= 256:
        raise MlcBuildError(f"head_dim is {s.head_dim}: GPU attention takes multiples of 4 from 32 to 256")
    if s.num_attention_heads % s.num_key_value_heads:
        raise MlcBuildError(
            f"num_attention_heads is {s.num_attention_heads}, num_key_value_heads {s.num_key_value_heads}: "
            "GPU attention needs a whole number of query heads for each key head"
        )


def emit_create(builder: relax.BlockBuilder, structure: Structure, dtype: str) -> None:
    """Add the function, as contract/kv_cache.py describes it."""
    s, device = structure, target.Target.current()
    heads, kv_heads, dim = s.num_attention_heads, s.num_key_value_heads, s.head_dim

    def kernels(page_size: tirx.Var, rotary: Rotary) -> Kernels:
        ragged, prefill, decode = attention.kernels(s, dtype, device)
        return Kernels(
            ragged=ragged,
            prefill=prefill,
            decode=decode,
            merge=tvm_kv_cache._merge_state_inplace(heads, dim, dtype, device),
            split_rotary=split_rotary(heads, kv_heads, dim, rotary, dtype),
            copy_single_page=tvm_kv_cache._copy_single_page(kv_heads, page_size, dim, dtype, device),
            compact=tvm_kv_cache._compact_kv_copy(kv_heads, dim, dtype, device),
        )

    with quick():
        kv_cache.emit_create(builder, structure, dtype, kernels)
