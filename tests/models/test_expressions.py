"""The little expressions of architecture files, and what they may not do."""

from __future__ import annotations

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.fields import evaluate

NAMES = {"hidden_size": 96, "heads": 6, "tied": True}


@pytest.mark.parametrize(
    ("expression", "value"),
    [("hidden_size // heads", 16), ("2 * heads + 1 - 3", 10), ("not tied", False), (7, 7), (False, False)],
)
def test_values(expression: object, value: object) -> None:
    assert evaluate(expression, NAMES) == value


@pytest.mark.parametrize("expression", ["heads // 0", "nobody", "__import__('os')", "heads.real", "heads if tied", ""])
def test_anything_else_is_an_error_that_says_what_is_allowed(expression: str) -> None:
    with pytest.raises(MlcBuildError, match=r"it may use numbers, .* and the names heads, hidden_size, tied"):
        evaluate(expression, NAMES)
