"""Tiles of TVM's attention among many tokens, in the shared memory that a device has."""

from __future__ import annotations

from itertools import chain
from typing import Any

import tvm
from tvm import ir, target, tirx
from tvm.relax.frontend.nn.llm import _kernel_common as tvm_kernels

from mlcbuild.compiler.gpu.rewriting import arguments, expect, is_length, mapped, nodes, variable
from mlcbuild.errors import MlcBuildError
from mlcbuild.models.structure import Structure

_PAGE = 16  # tokens
_MEMORY = "max_shared_memory_per_block"


def shared_memory(device: target.Target) -> int:
    """Bytes of a block."""
    return int(device.attrs.get(_MEMORY, 32768))


def fitting(structure: Structure, dtype: str, device: target.Target) -> tuple[target.Target, bool]:
    """The target for which TVM's prefill kernels have tiles that `device` has shared memory for, and whether they fit.

    TVM fits tiles to the memory for Metal alone; elsewhere they may be larger, or divide by no number of threads. Where
    none fits (float32, from head_dim 340 on, in 32 KB), one does without its values, as those of latents always do.
    Raises MlcBuildError otherwise.
    """
    kv_heads, heads, dim = structure.num_key_value_heads, structure.num_attention_heads, structure.head_dim
    if structure.absorbed:
        kv_heads, dim = 1, 2 * structure.cache_heads[2]
    most = shared_memory(device)
    metal = {"kind": "metal", "max_threads_per_block": tvm_kernels.get_max_num_threads_per_block(device)}
    fitted = ((more, target.Target({**metal, _MEMORY: most + more})) for more in range(0, most, 1024))
    for more, each in chain([(0, device)], fitted):
        try:
            config = tvm_kernels._get_prefill_kernel_config(kv_heads, heads, dim, dtype, each)
        except ValueError:
            continue
        _, _, _, _, _, rows, _, keys = config
        used = tvm_kernels._get_prefill_shared_memory_usage(rows, keys, dim, dtype)
        if used - (more > 0 or structure.absorbed) * keys * dim * tvm.DataType(dtype).itemsize <= most:
            return each, used <= most
    problem = f"head_dim is {dim}: no tile of attention in {dtype} fits into {most} bytes of shared memory"
    raise MlcBuildError(problem + ("; use a float16 format" if dtype == "float32" else ""))


def without_values(function: Any) -> Any:
    """The kernel without its tile of values: a thread reads those of its own columns where they lie."""
    given, body = arguments(function), function.body
    head, first = variable(body, "by"), variable(body, "L_kv_start")
    length = next(filter(is_length, nodes(body, ir.TensorLoad)))

    def load(node: Any) -> Any:
        if node.source.name != "V_smem":
            return node
        changes.append(node)
        token, column = first + node.indices[0], node.indices[1]
        if "pages" in given:
            page = given["page_values"][variable(body, "cur_page_indptr_begin") + token // _PAGE]
            value = given["pages"][page, 1, head, token % _PAGE, column]
        else:
            value = given["v"][variable(body, "L_kv_base") + token, head, column]
        return tirx.if_then_else(token < length, value, tirx.const(0, node.source.dtype))

    changes: list[Any] = []
    body = mapped(body, ir.TensorLoad, load)
    body = mapped(body, tirx.BufferStore, lambda node: tirx.Evaluate(0) if node.buffer.name == "V_smem" else node)
    expect(changes, 1, "a value is read from V_smem")
    return function.with_body(body)
