"""softmax_with_temperature on GPUs: a long row is shared by many blocks of threads.

The first kernel finds the maximum of each chunk of a row and the sum of exp(x / t - maximum) over it, the second puts
the chunks' figures together and writes the chunk's probabilities. Where the temperature is next to nothing, the
probability is shared by the largest logits.
"""

from __future__ import annotations

import functools
from typing import Any

from tvm.script import tirx as T

from mlcbuild.compiler.gpu.block_sums import add, combined

CHUNK = 4096
_COLD = 1e-5  # temperatures below this are 0


@functools.cache
def chunk_figures(threads: int) -> Any:
    """logits [b, V], temperature [b] -> sums and maxima [b, ceil(V / CHUNK)], all float32."""
    each = CHUNK // threads

    @T.prim_func(s_tir=True, private=True)
    def softmax_chunk_figures(
        var_logits: T.handle, var_temperature: T.handle, var_sums: T.handle, var_maxima: T.handle
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        batch = T.int32()
        width = T.int32()
        chunks = T.int32()
        logits = T.match_buffer(var_logits, (batch, width), "float32")
        temperature = T.match_buffer(var_temperature, (batch,), "float32")
        sums = T.match_buffer(var_sums, (batch, chunks), "float32")
        maxima = T.match_buffer(var_maxima, (batch, chunks), "float32")
        for bx in T.thread_binding(batch * chunks, thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("chunk"):
                    T.reads()
                    T.writes()
                    exchange = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
                    own = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    largest = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    scale = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    row: T.let[T.int32] = bx // chunks
                    start: T.let[T.int32] = bx % chunks * CHUNK
                    scale[0] = T.if_then_else(
                        temperature[row] > T.float32(_COLD), T.float32(1) / temperature[row], T.float32(1)
                    )
                    own[0] = T.min_value("float32")
                    for i in range(each):
                        if start + i * threads + tx < width:
                            own[0] = T.max(own[0], logits[row, start + i * threads + tx] * scale[0])
                    combined(exchange, own, tx, threads, T.max)
                    largest[0] = exchange[0]
                    T.tvm_storage_sync("shared")
                    own[0] = T.float32(0)
                    for i in range(each):
                        if start + i * threads + tx < width:
                            own[0] = own[0] + T.if_then_else(
                                temperature[row] > T.float32(_COLD),
                                T.exp(logits[row, start + i * threads + tx] * scale[0] - largest[0]),
                                T.if_then_else(
                                    logits[row, start + i * threads + tx] == largest[0], T.float32(1), T.float32(0)
                                ),
                            )
                    combined(exchange, own, tx, threads, add)
                    if tx == 0:
                        sums[row, bx % chunks] = exchange[0]
                        maxima[row, bx % chunks] = largest[0]

    return softmax_chunk_figures


@functools.cache
def probabilities(threads: int) -> Any:
    """logits [b, V], temperature [b], sums and maxima [b, chunks] -> probabilities [b, V], all float32."""
    each = CHUNK // threads

    @T.prim_func(s_tir=True, private=True)
    def softmax_probabilities(
        var_logits: T.handle, var_temperature: T.handle, var_sums: T.handle, var_maxima: T.handle, var_out: T.handle
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        batch = T.int32()
        width = T.int32()
        chunks = T.int32()
        logits = T.match_buffer(var_logits, (batch, width), "float32")
        temperature = T.match_buffer(var_temperature, (batch,), "float32")
        sums = T.match_buffer(var_sums, (batch, chunks), "float32")
        maxima = T.match_buffer(var_maxima, (batch, chunks), "float32")
        out = T.match_buffer(var_out, (batch, width), "float32")
        for bx in T.thread_binding(batch * chunks, thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("chunk"):
                    T.reads()
                    T.writes()
                    largest = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    scale = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    row: T.let[T.int32] = bx // chunks
                    start: T.let[T.int32] = bx % chunks * CHUNK
                    scale[0] = T.if_then_else(
                        temperature[row] > T.float32(_COLD), T.float32(1) / temperature[row], T.float32(1)
                    )
                    largest[0] = T.min_value("float32")
                    for i in range(chunks):
                        largest[0] = T.max(largest[0], maxima[row, i])
                    total[0] = T.float32(0)
                    for i in range(chunks):
                        total[0] = total[0] + sums[row, i] * T.if_then_else(
                            temperature[row] > T.float32(_COLD),
                            T.exp(maxima[row, i] - largest[0]),
                            T.if_then_else(maxima[row, i] == largest[0], T.float32(1), T.float32(0)),
                        )
                    for i in range(each):
                        if start + i * threads + tx < width:
                            out[row, start + i * threads + tx] = (
                                T.if_then_else(
                                    temperature[row] > T.float32(_COLD),
                                    T.exp(logits[row, start + i * threads + tx] * scale[0] - largest[0]),
                                    T.if_then_else(
                                        logits[row, start + i * threads + tx] == largest[0], T.float32(1), T.float32(0)
                                    ),
                                )
                                / total[0]
                            )

    return softmax_probabilities
