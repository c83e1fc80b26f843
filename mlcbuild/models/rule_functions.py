"""What rules of architecture files may call (mlcbuild.models.fields), beside Python's own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

MOST_LAYERS = 4096  # what no model comes near: they are gone through one by one


def _same(value: Any) -> Any:
    """The one value of a list that has it for every layer; any other value as it is."""
    return value[0] if isinstance(value, list | tuple) and value and all(v == value[0] for v in value) else value


def _others(count: int, without: Collection[int]) -> tuple[int, ...]:
    """The layers below `count` that are not among `without`."""
    return tuple(layer for layer in range(min(count, MOST_LAYERS + 1)) if layer not in without)


def _at(value: Any, layer: int, other: Any) -> Any:
    """What a list has for a layer, `other` where that is nothing; any other value as it is."""
    if not isinstance(value, list | tuple):
        return value
    return other if layer >= len(value) or value[layer] is None else value[layer]


def _place(item: Any, of: Collection[Any]) -> int:
    """Where an item is among those of a list, each once and in order, counted from 1; 0 where it is not."""
    return sorted({*of}).index(item) + 1 if item in of else 0


def _first(value: Any) -> Any:
    """The first of a list; any other value as it is."""
    return value[0] if isinstance(value, list | tuple) and value else value


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "others": _others,
    "int": int,
    "min": min,
    "max": max,
    "len": len,
    "same": _same,
    "at": _at,
    "place": _place,
    "first": _first,
}
