"""Whether a value out of a JSON file is a number: true, false, NaN and infinities are none."""

from __future__ import annotations

import math
from typing import Any


def is_number(value: Any) -> bool:
    """A finite one."""
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def is_above(bound: float, value: Any) -> bool:
    return is_number(value) and value > bound
