"""Attention over rows of latents on GPUs (mlcbuild.models.absorbed): TVM's kernels for one key head, changed.

A kernel is made for heads as wide as a row. Then queries and results become the cache's, which have a half of a row to
a head, as they lie in memory anyway; keys are read from the halves that keys and values of the cache are; and values
are the tile of keys that is there already. All heads share a key, so rows of queries are many and blocks are few: TVM
has as many as fit one key head. Here there are so many for each head.

Decoding is the kernel for many tokens with one token to each sequence: TVM's own decode has a thread for every few
numbers of a head, so that a block of 256 threads would take one key at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import ir, target, tirx
from tvm.relax.frontend.nn.llm import kv_cache as tvm_kv_cache

from mlcbuild.compiler.gpu import tiles
from mlcbuild.compiler.gpu.rewriting import arguments, expect, mapped, nodes
from mlcbuild.models.structure import Structure


def kernels(structure: Structure, dtype: str, device: target.Target, changed: Callable[..., Any]) -> tuple[Any, ...]:
    """Attention among new tokens, of new tokens over cached pages, and of one new token per sequence over these.

    `changed`: what windows and soft caps make of a kernel of TVM's.
    """
    heads, width = structure.num_attention_heads, 2 * structure.cache_heads[2]
    fitting, _ = tiles.fitting(structure, dtype, device)
    ragged = tvm_kv_cache._attention_prefill_ragged(1, heads, width, width, dtype, {}, fitting)
    prefill = tvm_kv_cache._attention_prefill(1, heads, width, dtype, False, {}, fitting)
    ragged, prefill = (_in_halves(changed(each, structure), structure) for each in (ragged, prefill))
    return ragged, prefill, one_by_one(prefill)


def _in_halves(function: Any, structure: Structure) -> Any:
    heads, _, half = structure.cache_heads
    given, loads = arguments(function), list[Any]()
    new: dict[str, Any] = {
        name: _halved(given[name], half) for name in ("q", "k", "v", "pages", "output", "lse") if name in given
    }

    def load(node: Any) -> Any:
        name, (*at, last) = str(node.source.name), node.indices
        if name == "V_smem":
            loads.append(node)
            token, number = node.indices
            transposed = int(keys.shape[0]) == 2 * half
            return keys[number, token] if transposed else keys[token, number]
        if not any(node.source.same_as(given.get(each)) for each in ("q", "k", "pages")):
            return node
        side, number = last // half, last % half
        if name == "q":
            return new["q"][at[0], at[1] * 2 + side, number]
        if name == "pages":
            return new["pages"][at[0], side, at[2], at[3], number]
        return tirx.if_then_else(side == 0, new["k"][at[0], at[1], number], new["v"][at[0], at[1], number])

    def store(node: Any) -> Any:
        name, at = node.buffer.name, node.indices
        if name == "V_smem":
            return tirx.Evaluate(0)
        if name == "lse":
            both = [tirx.BufferStore(new["lse"], node.value, [at[0], at[1] * 2 + side]) for side in range(2)]
            return tirx.SeqStmt(both)
        if name == "output":
            return tirx.BufferStore(new["output"], node.value, [at[0], at[1] * 2 + at[2] // half, at[2] % half])
        if name == "tile_id" and isinstance(node.value, tirx.Add) and isinstance(node.value.b, tirx.IntImm):
            steps.append(node)
            return tirx.BufferStore(node.buffer, node.value.a + node.value.b * (heads // 2), at)
        return node

    def loop(node: Any) -> Any:
        """As many blocks to each head; and a tile of keys is not overwritten before its values are read."""
        bound = node.thread_binding
        if bound is not None and str(bound.thread_tag) == "blockIdx.x":
            blocks.append(node)
            return tirx.For(node.loop_var, node.min, node.extent * (heads // 2), node.kind, node.body, bound)
        if not str(node.loop_var.name).startswith("iterator"):
            return node
        tiled.append(node)
        return tirx.For(node.loop_var, node.min, node.extent, node.kind, tirx.SeqStmt([barrier, node.body]))

    def rest(var: Any) -> Any:
        """What a block says that it reads."""
        name = str(var.name)
        return new[name] if name in new and var.same_as(given[name]) else var

    steps, blocks, tiled = list[Any](), list[Any](), list[Any]()
    calls = [node for node in nodes(function.body, tirx.Evaluate) if isinstance(node.value, ir.Call)]
    barrier = next(node for node in calls if "storage_sync" in str(node.value.op))
    keys = next(node.buffer for node in nodes(function.body, tirx.BufferStore) if node.buffer.name == "K_smem")
    body = mapped(function.body, ir.TensorLoad, load)
    body = mapped(mapped(body, tirx.BufferStore, store), tirx.For, loop)
    body = mapped(body, ir.Var, rest)
    expect(loads, 1, "a value is read from V_smem")
    expect([*steps, *blocks, *tiled], 3, "blocks are counted, and tiles of keys gone through,")
    params = [new.get(str(param.name), param) for param in function.params]
    return tirx.PrimFunc(params, body, function.ret_type, function.attrs)


def one_by_one(prefill: Any) -> Any:
    """The kernel over cached pages with one new token to each sequence, with the arguments of decoding."""
    given = arguments(prefill)
    body = mapped(prefill.body, ir.TensorLoad, lambda load: load.indices[0] if load.source.name == "q_indptr" else load)
    body = mapped(body, ir.Var, lambda var: tirx.const(0, "int32") if var.same_as(given["causal"]) else var)
    params = [param for param in prefill.params if str(param.name) not in ("q_indptr", "causal")]
    return tirx.PrimFunc(params, body, prefill.ret_type, prefill.attrs)


def _halved(argument: Any, half: int) -> Any:
    """The argument as the cache has it, where the kernel's has whole rows: [..., heads, width], or [n, heads]."""
    name, shape = str(argument.name), list(argument.shape)
    if name in ("q", "output", "lse"):
        shape[1] = shape[1] * 2
    if name != "lse":
        shape[-1] = half
    moved = {"elem_offset": argument.elem_offset} if name == "pages" else {}
    return tirx.decl_buffer(shape, argument.dtype, name, **moved)
