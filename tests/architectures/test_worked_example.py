"""The worked example of docs/architectures.md: without its file Granite is unknown; the file is the stock one."""

from __future__ import annotations

import pytest
import yaml

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.architecture import choose
from tests.architectures.agreement import ARCHITECTURES, config_of, known_architectures
from tests.architectures.family_cases import CASES
from tests.docs.pages import DOCS, blocks

PAGE = {block.info[:2]: block.text for block in blocks((DOCS / "architectures.md").read_text())}
GRANITE = CASES["granite"]


def test_the_error_that_the_page_shows() -> None:
    kin = ("granite", "hyperclovax")
    others = {name: each for name, each in known_architectures().items() if not name.startswith(kin)}
    with pytest.raises(MlcBuildError) as raised:
        choose(others, config_of(GRANITE))
    first, *rest = PAGE["text", "granite"].splitlines()
    assert str(raised.value).startswith(first.removesuffix("…"))
    assert "\n".join(rest) in str(raised.value)


def test_a_llama_with_four_scales_is_four_lines() -> None:
    """One for each scale, and one for the number that the fourth divides by; nothing of llama's is said again."""
    text = PAGE["yaml", "recipes/architectures/granite.yaml"]
    assert (ARCHITECTURES / "granite.yaml").read_text().partition("\n")[2] == text
    file = yaml.safe_load(text)
    assert (file.pop("extends"), file.pop("tested_against")) == ("llama", "transformers")
    assert list(file) == ["config"] and len([name for name in file["config"] if not name.startswith("_")]) == 4
    lines = [line for line in PAGE["yaml", "recipes/architectures/granite.yaml"].splitlines() if line[0] not in "#"]
    assert len(lines) <= 3 + 5
