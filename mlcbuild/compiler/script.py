"""TVM's script parser without its most expensive habit.

Each `@T.prim_func` looks at the whole call stack, source lines included, which takes a tenth of a second; the tensor
core intrinsics are 248 of them, 16 s in all. The parser needs the frames, and the source line of one of them.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import linecache
import sys
from collections.abc import Iterator
from types import FrameType, SimpleNamespace

_PARSER = "tvm.tirx.script.parser.entry"
_ENCLOSING = 2  # the frame around the one that defines a function: of a class, where the function is a method


def _frames(context: int = 1) -> list[inspect.FrameInfo]:
    """`inspect.stack()` with the source line of the enclosing frame only."""
    found: list[inspect.FrameInfo] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name, line = frame.f_code.co_filename, frame.f_lineno
        lines = [linecache.getline(name, line)] if len(found) == _ENCLOSING else None
        found.append(inspect.FrameInfo(frame, name, line, frame.f_code.co_name, lines, 0 if lines else None))
        frame = frame.f_back
    return found


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Parse TVM script quickly inside this context: the module of TVM that parses it, and no other, sees `_frames`."""
    parser = importlib.import_module(_PARSER)
    original = parser.inspect
    parser.inspect = SimpleNamespace(**{**vars(inspect), "stack": _frames})  # type: ignore[attr-defined]
    try:
        yield
    finally:
        parser.inspect = original  # type: ignore[attr-defined]
