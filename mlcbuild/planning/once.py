"""What many recipes share is worked out once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from mlcbuild.errors import MlcBuildError


class Knowing(Protocol):
    known: dict[tuple[Any, ...], Any]


_K = TypeVar("_K", bound=Knowing)
_P = ParamSpec("_P")
_T = TypeVar("_T")


def once(method: Callable[Concatenate[_K, _P], _T]) -> Callable[Concatenate[_K, _P], _T]:
    """The method, which works out once what it gives for things of the same names, or why it gives nothing."""
    called = method.__name__

    def known(self: _K, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        key = (called, *[getattr(value, "name", value) for value in args])
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = _tried(method, self, *args, **kwargs)
        if found[1] is not None:
            raise found[1].with_traceback(None)
        given: _T = found[0]
        return given

    return known


def _tried(method: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, MlcBuildError | None]:
    """What it gives, or what it raises."""
    try:
        return method(*args, **kwargs), None
    except MlcBuildError as error:
        return None, error
