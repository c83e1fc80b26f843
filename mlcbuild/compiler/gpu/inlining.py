"""The blocks of a function, and inlining around the one that a schedule is about."""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx


def inline_producers(sch: Any, block: Any) -> None:
    """Everything that `block` reads from, however indirectly, becomes part of it."""
    while producers := sch.get_producers(block):
        for producer in producers:
            inline_producers(sch, producer)
            sch.compute_inline(producer)


def inline_consumers(sch: Any, block: Any) -> Any:
    """One block that does everything that follows `block`, or None where nothing does."""
    consumers = sch.get_consumers(block)
    if not consumers:
        return None
    last = block
    while nexts := sch.get_consumers(last):
        (last,) = nexts
    while True:
        (first,) = sch.get_consumers(block)
        if sch.get(first).same_as(sch.get(last)):
            break
        sch.compute_inline(first)
    for producer in sch.get_producers(last):
        if not sch.get(producer).same_as(sch.get(block)):
            inline_producers(sch, producer)
            sch.compute_inline(producer)
    return last


def blocks_of(function: tirx.PrimFunc) -> dict[str, Any]:
    """The function's blocks by name."""
    sch = s_tir.Schedule(function)
    blocks = [sch.get(block) for block in sch.get_child_blocks(sch.get_sblock("root"))]
    return {block.name_hint: block for block in blocks}


def scheduled(function: tirx.PrimFunc) -> bool:
    """Whether nothing is left to do: such a function may have several root blocks."""
    return function.attrs is not None and bool(function.attrs.get("tirx.is_scheduled", False))
