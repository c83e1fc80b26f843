"""Checking drafted tokens on GPUs (speculative decoding): which of a tree's tokens the model would have sampled.

Leviathan et al., arXiv 2211.17192, on trees: a child is accepted with probability p(token) / q(token); else what the
model still has over the draft, max(p - q, 0) renormalized, is what its next sibling is compared with.
"""

from __future__ import annotations

import functools
from typing import Any

from tvm.script import tirx as T

from mlcbuild.compiler.gpu.block_sums import summed

_NOTHING_LEFT = 1e-7


@functools.cache
def verify(threads: int) -> Any:
    """One block of threads for each tree.

    draft_probs [nodes, V]: what a node's token was drawn from; model_probs [nodes, V]: what its children should be
    drawn from, changed in place; first_child, next_sibling [nodes] int32, -1 for none; uniform [nodes]; parent [trees]
    int32: the root before, the last accepted node after.
    """

    @T.prim_func(s_tir=True, private=True)
    def verify_drafts(
        var_draft_probs: T.handle, var_draft_tokens: T.handle, var_model_probs: T.handle, var_first_child: T.handle,
        var_next_sibling: T.handle, var_uniform: T.handle, var_parent: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        nodes = T.int32()
        width = T.int32()
        trees = T.int32()
        draft_probs = T.match_buffer(var_draft_probs, (nodes, width), "float32")
        draft_tokens = T.match_buffer(var_draft_tokens, (nodes,), "int32")
        model_probs = T.match_buffer(var_model_probs, (nodes, width), "float32")
        first_child = T.match_buffer(var_first_child, (nodes,), "int32")
        next_sibling = T.match_buffer(var_next_sibling, (nodes,), "int32")
        uniform = T.match_buffer(var_uniform, (nodes,), "float32")
        parent = T.match_buffer(var_parent, (trees,), "int32")
        for bx in T.thread_binding(trees, thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("tree"):
                    T.reads()
                    T.writes()
                    exchange = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
                    at = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    child = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    accepted = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    left = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    at[0] = parent[bx]
                    child[0] = first_child[at[0]]
                    # A tree has no more nodes than there are: every round leaves one node behind.
                    while child[0] >= 0:
                        accepted[0] = T.if_then_else(
                            model_probs[at[0], draft_tokens[child[0]]]
                            >= uniform[child[0]] * draft_probs[child[0], draft_tokens[child[0]]],
                            1,
                            0,
                        )
                        left[0] = T.float32(0)
                        for i in range((width + threads - 1) // threads):
                            if i * threads + tx < width:
                                left[0] = left[0] + T.max(
                                    model_probs[at[0], i * threads + tx] - draft_probs[child[0], i * threads + tx],
                                    T.float32(0),
                                )
                        summed(exchange, left, tx, threads)
                        if accepted[0] == 1 or left[0] < T.float32(_NOTHING_LEFT):
                            at[0] = child[0]
                            child[0] = first_child[child[0]]
                        else:
                            for i in range((width + threads - 1) // threads):
                                if i * threads + tx < width:
                                    model_probs[at[0], i * threads + tx] = (
                                        T.max(
                                            model_probs[at[0], i * threads + tx]
                                            - draft_probs[child[0], i * threads + tx],
                                            T.float32(0),
                                        )
                                        / left[0]
                                    )
                            child[0] = next_sibling[child[0]]
                        T.tvm_storage_sync("shared")
                    if tx == 0:
                        parent[bx] = at[0]

    return verify_drafts
