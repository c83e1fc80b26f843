"""What many recipes share is worked out once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar


class Knowing(Protocol):
    known: dict[tuple[Any, ...], Any]


_K = TypeVar("_K", bound=Knowing)
_P = ParamSpec("_P")
_T = TypeVar("_T")


def once(method: Callable[Concatenate[_K, _P], _T]) -> Callable[Concatenate[_K, _P], _T]:
    """The method, which works out once what it gives for things of the same names."""

    def known(self: _K, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        key = (method.__name__, *map(_name, args))
        if key not in self.known:
            self.known[key] = method(self, *args, **kwargs)
        found: _T = self.known[key]
        return found

    return known


def _name(value: Any) -> Any:
    return tuple(sorted(value.items())) if isinstance(value, Mapping) else getattr(value, "name", value)
