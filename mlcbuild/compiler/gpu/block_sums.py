"""What the threads of a block add up together, through shared memory, with a barrier after each step.

So the width of a warp does not matter. Macros of TVM script: `exchange` is shared memory with a number for each thread.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T


def add(a: Any, b: Any) -> Any:
    return a + b


@T.macro
def combined(exchange, own, tx, threads, combine):
    """exchange[0] becomes what `combine` makes of own[0] of all threads: `add`, or T.max."""
    exchange[tx] = own[0]
    T.tvm_storage_sync("shared")
    for level in T.unroll(threads.bit_length() - 1):
        if tx < (threads // 2 >> level):
            exchange[tx] = combine(exchange[tx], exchange[tx + (threads // 2 >> level)])
        T.tvm_storage_sync("shared")


@T.macro
def summed(exchange, own, tx, threads):
    """own[0] of each thread becomes the sum of all of them."""
    combined(exchange, own, tx, threads, add)
    own[0] = exchange[0]
    T.tvm_storage_sync("shared")


@T.macro
def running_sums(probs, row, width, each, threads, tx, exchange, run, own):
    """Of a row of which each thread has `each` neighbouring numbers: own becomes the sums of all parts before that of
    this thread, of those and its own, and of the whole row."""
    run[0] = T.float32(0)
    for i in range(each):
        if tx * each + i < width:
            run[0] = run[0] + probs[row, tx * each + i]
    exchange[tx] = run[0]
    T.tvm_storage_sync("shared")
    for level in T.unroll(threads.bit_length() - 1):
        own[0] = exchange[tx]
        own[1] = exchange[T.max(tx - (1 << level), 0)]
        T.tvm_storage_sync("shared")
        exchange[tx] = own[0] + T.if_then_else(tx >= (1 << level), own[1], T.float32(0))
        T.tvm_storage_sync("shared")
    own[0] = exchange[T.max(tx - 1, 0)]
    own[0] = T.if_then_else(tx == 0, T.float32(0), own[0])
    own[1] = exchange[tx]
    own[2] = exchange[threads - 1]
