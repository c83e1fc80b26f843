"""TVM's script parser without its most expensive habit.

Each `@T.prim_func` looks at the whole call stack, source lines included, which takes a tenth of a second; the tensor
core intrinsics are 248 of them, 16 s in all. The parser needs the frames only.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from types import FrameType


def _frames(context: int = 1) -> list[inspect.FrameInfo]:
    """`inspect.stack()` without source lines."""
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        found.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back
    return found


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Parse TVM script quickly inside this context. No function may be defined in an `ir_module` class there."""
    original = inspect.stack
    inspect.stack = _frames
    try:
        yield
    finally:
        inspect.stack = original
