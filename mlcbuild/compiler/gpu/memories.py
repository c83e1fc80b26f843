"""What kernels of heads with a matrix for a memory share: delta.py, state_space.py and mlstm.py.

A block has some columns of a head's matrix. A column's rows are shared out among the parts of a block, and stay in a
thread's registers from the first token to the last. Keys and queries of some tokens at a time are in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

COLUMNS = 32  # of a block
_ROWS = 32  # of a thread, at most
_AHEAD, _KEPT = 8, 2048  # tokens whose keys and queries a block has at a time: so many, or fewer with so many numbers


@dataclass(frozen=True)
class Sharing:
    """Of `size` rows: how many parts have how many each, all of these together, and tokens that a block has at once."""

    size: int
    parts: int
    rows: int
    padded: int
    ahead: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return COLUMNS * self.parts


def sharing(size: int) -> Sharing:
    parts = -(-size // _ROWS)
    rows = -(-size // parts)
    padded = parts * rows
    return Sharing(size, parts, rows, padded, max(1, min(_AHEAD, _KEPT // (2 * padded))))


@T.macro
def load_state(state, before, sequence, head, part, column, columns, size, rows):
    """A thread's rows of one column of a head's matrix [size, columns]; zeros where there is nothing."""
    for i in range(rows):
        state[i] = T.float32(0)
        if part * rows + i < size and column < columns:
            state[i] = before[sequence, (head * size + part * rows + i) * columns + column]


@T.macro
def store_state(state, after, sequence, head, part, column, columns, size, rows):
    """The same back."""
    for i in range(rows):
        if part * rows + i < size and column < columns:
            after[sequence, (head * size + part * rows + i) * columns + column] = state[i]


@T.macro
def load_pairs(pair, x, first, chunk, tokens, group, groups, tx, size, padded, ahead, threads):
    """Queries and keys of a chunk's tokens, `size` numbers of each: x [n, groups of queries, groups of keys, ...]."""
    for turn in range((ahead * 2 * padded + threads - 1) // threads):
        at: T.let[T.int32] = turn * threads + tx
        token: T.let[T.int32] = chunk * ahead + at // (2 * padded)
        row: T.let[T.int32] = at % padded
        if at < ahead * 2 * padded:
            pair[at // (2 * padded), at // padded % 2, row] = T.float32(0)
            if token < tokens and row < size:
                pair[at // (2 * padded), at // padded % 2, row] = x[
                    first + token, (at // padded % 2 * groups + group) * size + row
                ]
