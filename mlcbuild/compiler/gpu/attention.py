"""Attention on GPUs: TVM's kernels, and what they lack: sliding windows that are exact, sinks, soft caps of scores, and
linear biases. The kernel that merges two attentions is our own, and so are CUDA's in 16-bit floats (cuda_attention.py).

TVM's kernels are functions already scheduled; they are changed where they say which keys a row sees, and where they
store its scores. Windows are as on the CPU (mlcbuild.models.layer): a layer with a negative scale slides, and the
window is measured in the positions that the KV cache gives to its kernels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from tvm import ir, target, tirx
from tvm.relax.frontend.nn.llm import kv_cache as tvm_kv_cache
from tvm.script import tirx as T

from mlcbuild.compiler.abi.kv_cache import Kernels
from mlcbuild.compiler.gpu import (
    cuda_attention,
    decode_attention,
    indexed_attention,
    indexed_choice,
    latent_attention,
    tiles,
    vector_rows,
)
from mlcbuild.compiler.gpu.rewriting import arguments, expect, index_of, is_length, mapped, nodes, variable
from mlcbuild.compiler.gpu.rope import split_rotary
from mlcbuild.models.rope import Rotary
from mlcbuild.models.structure import Structure

_INDEXED = indexed_attention.ragged, indexed_attention.prefill, indexed_attention.decode
_VECTOR = 4  # neighbouring values that one thread merges
_NO_SCALING: Mapping[str, Any] = {}  # the kernels' own rotary embedding is not used


def cache_kernels(structure: Structure, dtype: str, page_size: tirx.Var, rotary: Rotary, threads: int) -> Kernels:
    """What the KV cache of a GPU library calls, for the current target, with up to `threads` threads to a block."""
    s, device = structure, target.Target.current()
    heads, kv_heads, dim = s.cache_heads
    turn, append = split_rotary(heads, kv_heads, dim, rotary, dtype), None
    if s.indexer:
        ragged, prefill, decode = (of(s, dtype) for of in _INDEXED)
    else:
        ragged, prefill, decode = kernels(s, dtype, device)
        if _own(s, dtype, device):
            turn, append = cuda_attention.keeping(turn), cuda_attention.append(s, dtype)
    return Kernels(
        ragged=ragged,
        prefill=prefill,
        decode=decode,
        merge=indexed_choice.merge(s, dtype) if s.indexer else merge(heads, dim, dtype, threads),
        split_rotary=turn,
        append=append or tvm_kv_cache._kv_cache_transpose_append(kv_heads, dim, dtype),
        copy_single_page=tvm_kv_cache._copy_single_page(kv_heads, page_size, dim, dtype, device),
        compact=tvm_kv_cache._compact_kv_copy(kv_heads, dim, dtype, device),
    )


def _own(structure: Structure, dtype: str, device: target.Target) -> bool:
    """Whether attention is C++ of our own."""
    return device.kind.name == "cuda" and cuda_attention.takes(structure, dtype)


def kernels(structure: Structure, dtype: str, device: target.Target) -> tuple[Any, ...]:
    """Attention among new tokens, of new tokens over cached pages, and of one new token per sequence over these."""
    s = structure
    heads, kv_heads, dim = s.num_attention_heads, s.num_key_value_heads, s.head_dim
    if _own(s, dtype, device):
        return cuda_attention.ragged(s, dtype), cuda_attention.prefill(s, dtype), cuda_attention.decode(s, dtype)
    if s.absorbed:
        return latent_attention.kernels(s, dtype, device, _changed)
    fitting, whole = tiles.fitting(s, dtype, device)
    ragged = tvm_kv_cache._attention_prefill_ragged(kv_heads, heads, dim, dim, dtype, _NO_SCALING, fitting)
    prefill = tvm_kv_cache._attention_prefill(kv_heads, heads, dim, dtype, False, _NO_SCALING, fitting)
    if not whole:
        ragged, prefill = map(tiles.without_values, (ragged, prefill))
    if device.kind.name in vector_rows.KINDS:
        decode = decode_attention.decode(s, dtype, functools.partial(_power_slope, s), tiles.shared_memory(device))
        return _changed(ragged, s), _changed(prefill, s), decode
    decode = tvm_kv_cache._attention_decode(kv_heads, heads, dim, dtype, False, _NO_SCALING, device)
    return _changed(ragged, s), _changed(prefill, s), _changed(decode, s)


@functools.cache
def merge(heads: int, dim: int, dtype: str, threads: int) -> Any:
    """Two attentions over different keys into one, in place: V [n, heads, dim] of `dtype`, S [n, heads] float32.

    V's rows are means of values, and S the logarithms to base 2 of their weights' sums. TVM's own kernel has all
    threads of a row read S and then write it, which is right only where they run in lockstep; here one thread does
    both. A block has up to `threads` threads, for as many heads as divide their number: TVM's leaves out the rest.
    """
    lanes = dim // _VECTOR
    together = max(
        count for count in range(1, heads + 1) if heads % count == 0 and (count * lanes <= threads or count == 1)
    )

    @T.prim_func(s_tir=True, private=True)
    def attention_merge(v: T.handle, s: T.handle, v_other: T.handle, s_other: T.handle):
        T.func_attr({"tirx.is_scheduled": True})
        N = T.int32()
        V = T.match_buffer(v, (N, heads, dim), dtype)
        S = T.match_buffer(s, (N, heads), "float32")
        V_other = T.match_buffer(v_other, (N, heads, dim), dtype)
        S_other = T.match_buffer(s_other, (N, heads), "float32")
        for bx in T.thread_binding(N, thread="blockIdx.x"):
            for by in T.thread_binding(heads // together, thread="blockIdx.y"):
                for ty in T.thread_binding(together, thread="threadIdx.y"):
                    for tx in T.thread_binding(lanes, thread="threadIdx.x"):
                        with T.sblock("merge"):
                            T.reads()
                            T.writes()
                            share = T.sblock_alloc_buffer((together, 2), "float32", scope="shared")
                            own = T.sblock_alloc_buffer((3,), "float32", scope="local")
                            values = T.sblock_alloc_buffer((_VECTOR,), dtype, scope="local")
                            others = T.sblock_alloc_buffer((_VECTOR,), dtype, scope="local")
                            head: T.let[T.int32] = by * together + ty
                            if tx == 0:
                                own[2] = T.max(S[bx, head], S_other[bx, head])
                                own[0] = T.exp2(S[bx, head] - own[2])
                                own[1] = T.exp2(S_other[bx, head] - own[2])
                                share[ty, 0] = own[0] / (own[0] + own[1])
                                share[ty, 1] = own[1] / (own[0] + own[1])
                                S[bx, head] = T.log2(own[0] + own[1]) + own[2]
                            T.tvm_storage_sync("shared")
                            for i in T.vectorized(_VECTOR):
                                values[i] = V[bx, head, tx * _VECTOR + i]
                            for i in T.vectorized(_VECTOR):
                                others[i] = V_other[bx, head, tx * _VECTOR + i]
                            for i in T.serial(_VECTOR):
                                values[i] = values[i] * share[ty, 0] + others[i] * share[ty, 1]
                            for i in T.vectorized(_VECTOR):
                                V[bx, head, tx * _VECTOR + i] = values[i]

    return attention_merge


def _changed(function: Any, structure: Structure) -> Any:
    """The kernel with the structure's soft cap, window and linear biases; the same one where there are none."""
    window, cap, bias = structure.sliding_window_size, structure.attn_logit_softcapping, structure.alibi_bias_max
    if cap is not None:
        function = _capped(function, cap)
    function = function if window is None else _sliding(function, window, structure.chunked)
    function = function if bias is None else _biased(function, structure, bias)
    return _with_sinks(function, structure.head_dim) if "sinks" in structure.roles() else function


def _with_sinks(function: Any, dim: int) -> Any:
    """The last number of a query is its sink: a logit that takes a share and gives nothing (mlcbuild.models.heads).

    Where results are stored, they are lowered by its share, and the logarithm of the sum is raised by it: once, for the
    set of keys that the row's own is among.
    """
    given = arguments(function)
    query, changes = given["q" if "causal" in given else "Q"], []
    largest = next(load for load in nodes(function.body, ir.TensorLoad) if load.source.name in ("m_smem", "st_m"))
    total = next(load for load in nodes(function.body, ir.TensorLoad) if load.source.name in ("d_smem", "st_d"))

    def own_is_there(row: Any) -> Any:
        if "pages" not in given:
            return tirx.const(True, "bool")
        sequence = index_of(function.body, "page_indptr" if "causal" in given else "page_table_indptr")
        length = next(filter(is_length, nodes(function.body, ir.TensorLoad)))
        return given["q_rope_position"][row] - given["k_rope_pos_offset"][sequence] < length

    def store(node: Any) -> Any:
        if node.buffer.name not in ("output", "lse"):
            return node
        changes.append(node)
        row, head = node.indices[0], node.indices[1]
        at = nodes(node.value, ir.TensorLoad)[-1].indices[0] if "causal" in given else 0
        lse = largest.source[at] + tirx.log2(total.source[at])
        sink = query[row, head, dim - 1].astype("float32") * _float(math.log2(math.e))
        most = tirx.max(lse, sink)
        both = most + tirx.log2(tirx.exp2(lse - most) + tirx.exp2(sink - most))
        both = tirx.if_then_else(own_is_there(row), both, lse)
        value = both if node.buffer.name == "lse" else node.value.astype("float32") * tirx.exp2(lse - both)
        return tirx.BufferStore(node.buffer, value.astype(node.buffer.dtype), node.indices)

    body = mapped(function.body, tirx.BufferStore, store)
    expect(changes, 2, "a result is stored in output or lse")
    return function.with_body(body)


def _capped(function: Any, cap: float) -> Any:
    """Scores s, which are stored in powers of two, become cap * tanh(s / cap)."""

    def store(node: Any) -> Any:
        # Where sums of products go to the scores: `S_smem[i, j] = S_local[i, j]`, or `S_local[j] = t0[0]` in decode.
        if (node.buffer.name, _loaded(node.value)) not in (("S_smem", "S_local"), ("S_local", "t0")):
            return node
        changes.append(node)
        # tanh(x) = 1 - 2 / (exp(2 x) + 1); bounded above, because GPUs need not have an infinity.
        power = tirx.exp2(tirx.min(node.value * _float(2 / cap), _float(100)))
        capped = _float(cap * math.log2(math.e)) * (_float(1) - _float(2) / (power + _float(1)))
        return tirx.BufferStore(node.buffer, capped, node.indices)

    changes: list[Any] = []
    body = mapped(function.body, tirx.BufferStore, store)
    expect(changes, 1, "a score is stored in S_smem or S_local")
    return function.with_body(body)


def _sliding(function: Any, window: int, chunked: bool) -> Any:
    """Rows of layers with a negative scale see keys that are less than `window` positions back; scales are positive.

    `chunked`: those of their own chunk of so many positions.
    """
    given = arguments(function)
    scale, pages = given["sm_scale"], "pages" in given
    changes: list[Any] = []
    paged_distance = functools.partial(_paged_distance, given)

    def reach(row: Any) -> Any:
        """How many positions the row sees."""
        return given["q_rope_position"][row] % window + 1 if chunked else window

    def distance(node: Any) -> Any:
        """How many positions the row is after the key that an `if` is about, and the row; None for any other `if`."""
        if "causal" not in given:  # decode: one row for each sequence
            if not _is_score(node.then_case):
                return None
            sequence = index_of(function.body, "page_table_indptr")
            return paged_distance(sequence, sequence, node.condition.a), sequence
        found = _causal_limit(node.condition)
        if found is None:
            return None
        column, limit = found
        sequence = index_of(limit, "q_indptr")
        row = _paged_row(given, sequence, _row(limit))
        if not pages:  # keys and rows are tokens of the same call: the last key that a row sees is its own
            return limit - 1 - column, row
        return paged_distance(sequence, row, column), row

    def condition(node: Any) -> Any:
        found = distance(node)
        if found is None:
            return node
        changes.append(node)
        back, row = found
        visible = tirx.any(scale >= _float(0), back < reach(row))
        return tirx.IfThenElse(tirx.all(node.condition, visible), node.then_case, node.else_case)

    def loop(node: Any) -> Any:
        """Decode's loop over tiles of keys, from the first tile that the row sees: it is bound by what it reads."""
        tiles = node.extent
        if not isinstance(tiles, tirx.FloorDiv) or not any(map(is_length, nodes(tiles, ir.TensorLoad))):
            return node
        loops.append(node)
        sequence = index_of(function.body, "page_table_indptr")
        first = tirx.max(paged_distance(sequence, sequence, 0) - reach(sequence) + 1, 0) // tiles.b
        first = tirx.if_then_else(scale < _float(0), first, 0)
        body = mapped(node.body, ir.Var, lambda var: var + first if var.same_as(node.loop_var) else var)
        return tirx.For(node.loop_var, node.min, tirx.max(tiles - first, 0), node.kind, body)

    def magnitude(node: Any) -> Any:
        value = mapped(node.value, ir.Var, lambda var: tirx.abs(var) if var.same_as(scale) else var)
        return tirx.BufferStore(node.buffer, value, node.indices)

    body = mapped(function.body, tirx.BufferStore, magnitude)
    body = mapped(body, tirx.IfThenElse, condition)
    loops: list[Any] = []
    body = body if "causal" in given else mapped(body, tirx.For, loop)
    expect(changes, 2 if "causal" in given else 1, "an `if` says which keys a row sees")
    expect(loops, 0 if "causal" in given else 1, "a loop goes over tiles of kv_chunk_len keys")
    return function.with_body(body)


def _biased(function: Any, structure: Structure, largest: float) -> Any:
    """Linear biases (ALiBi; Press et al., arXiv 2108.12409): scores, which are stored in powers of two, are lowered by
    the distance of row and key times the head's slope."""
    heads, group = structure.num_attention_heads, structure.num_attention_heads // structure.num_key_value_heads
    given, changes = arguments(function), list[Any]()

    def lowered(node: Any, head: Any, distance: Any) -> Any:
        changes.append(node)
        slope = _slope(head, heads, largest) * _float(math.log2(math.e))
        return tirx.BufferStore(node.buffer, node.value - slope * distance.astype("float32"), node.indices)

    def decode(node: Any) -> Any:
        """`if column < kv_chunk_len: S_local[j] = t0[0]`; the sequence and the head are those of `lse`."""
        if not _is_score(node.then_case):
            return node
        limit = node.condition.a if isinstance(node.condition, tirx.And) else node.condition
        sequence, head = next(s.indices for s in nodes(function.body, tirx.BufferStore) if s.buffer.name == "lse")
        distance = _paged_distance(given, sequence, sequence, limit.a)
        return tirx.IfThenElse(node.condition, lowered(node.then_case, head, distance), node.else_case)

    def prefill(node: Any) -> Any:
        """`S_smem[i, j] = S_local[i, j]`: rows of a tile are a key head's queries, token by token."""
        if node.buffer.name != "S_smem" or _loads(node.value) != ["S_local"]:
            return node
        start, first, kv_head = (variable(function.body, name) for name in ("LH_start", "L_kv_start", "by"))
        (i, j), limits = node.indices, [_causal_limit(n.condition) for n in nodes(function.body, tirx.IfThenElse)]
        row, column = (start + i) // group, first + j
        if "pages" not in given:  # keys and rows are tokens of the same call
            distance = row - column
        else:
            sequence = index_of(next(limit for limit in limits if limit)[1], "q_indptr")
            distance = _paged_distance(given, sequence, _paged_row(given, sequence, row), column)
        return lowered(node, kv_head * group + (start + i) % group, distance)

    decoding = "causal" not in given
    body = mapped(function.body, *((tirx.IfThenElse, decode) if decoding else (tirx.BufferStore, prefill)))
    expect(changes, 1, "a score is stored in S_smem or S_local")
    return function.with_body(body)


def _power_slope(structure: Structure, head: Any) -> Any:
    """A head's slope of scores that are powers of two."""
    return _slope(head, structure.num_attention_heads, structure.alibi_bias_max or 0.0) * _float(math.log2(math.e))


def _slope(head: Any, heads: int, largest: float) -> Any:
    """2 ** (-largest * h / heads) of head h, from 1. Where heads are no power of two, those beyond the next lower power
    p have every second slope of 2 p heads (transformers, modeling_bloom.py)."""
    power = 1 << (heads.bit_length() - 1)
    rest = (2 * (head - power) + 1).astype("float32") * _float(-largest / (2 * power))
    return tirx.exp2(tirx.if_then_else(head < power, (head + 1).astype("float32") * _float(-largest / power), rest))


def _paged_distance(given: Mapping[str, Any], sequence: Any, row: Any, column: Any) -> Any:
    """How many positions a row (a token of the call) is after a key (of those in its sequence's pages)."""
    return given["q_rope_position"][row] - (given["k_rope_pos_offset"][sequence] + column)


def _paged_row(given: Mapping[str, Any], sequence: Any, row: Any) -> Any:
    """The call's token that is a sequence's; rows that only fill up a tile have no position."""
    starts = given["q_indptr"]
    return tirx.min(starts[sequence] + row, starts[sequence + 1] - 1)


def _causal_limit(condition: Any) -> tuple[Any, Any] | None:
    """(column, limit) of `column < limit` for causal rows, in a mask that asks whether they are; None elsewhere."""
    calls = nodes(condition, ir.Call)
    limits = [call.args[1] for call in calls if len(call.args) == 3 and isinstance(call.args[1], tirx.LT)]
    return (limits[0].a, limits[0].b) if limits else None


def _row(limit: Any) -> Any:
    """The row's number in its sequence, which a causal limit depends on."""
    rows = {str(var.name): var for var in nodes(limit, ir.Var) if str(var.name).startswith("row")}
    expect([*rows], 1, "the last key that a row sees depends on `row`")
    return next(iter(rows.values()))


def _is_score(statement: Any) -> bool:
    """Decode's `S_local[j] = t0[0]`, capped or not."""
    if not isinstance(statement, tirx.BufferStore) or statement.buffer.name != "S_local":
        return False
    return _loads(statement.value) == ["t0"]


def _loads(value: Any) -> list[str]:
    return [load.source.name for load in nodes(value, ir.TensorLoad)]


def _loaded(value: Any) -> str | None:
    return str(value.source.name) if isinstance(value, ir.TensorLoad) else None


def _float(value: float) -> Any:
    return tirx.const(value, "float32")
