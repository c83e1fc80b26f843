"""The worked example of docs/architectures.md: Granite is unknown, one file is added, and transformers agrees."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.architecture import choose
from tests.architectures import agreement
from tests.architectures.agreement import IDS, Agreement, config_of, error, known_architectures
from tests.architectures.cases import like_llama
from tests.docs.pages import DOCS, blocks

PAGE = {block.info[:2]: block.text for block in blocks((DOCS / "architectures.md").read_text())}
GRANITE = like_llama(
    "granite", embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.1, logits_scaling=4.0
)


def test_the_error_that_the_page_shows() -> None:
    with pytest.raises(MlcBuildError) as raised:
        choose(known_architectures(), config_of(GRANITE))
    first, *rest = PAGE["text", "granite"].splitlines()
    assert str(raised.value).startswith(first.removesuffix("…"))
    assert "\n".join(rest) in str(raised.value)


def test_a_llama_with_four_scales_is_four_lines() -> None:
    """One for each scale, and one for the number that the fourth divides by; nothing of llama's is said again."""
    file = yaml.safe_load(PAGE["yaml", "recipes/architectures/granite.yaml"])
    assert (file.pop("extends"), file.pop("tested_against")) == ("llama", "transformers")
    assert list(file) == ["config"] and len([name for name in file["config"] if not name.startswith("_")]) == 4
    lines = [line for line in PAGE["yaml", "recipes/architectures/granite.yaml"].splitlines() if line[0] not in "#"]
    assert len(lines) <= 3 + 5


@pytest.mark.slow
def test_the_file_computes_what_transformers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(agreement.ARCHITECTURES, tmp_path / "architectures")
    text = PAGE["yaml", "recipes/architectures/granite.yaml"]
    (tmp_path / "architectures" / "granite.yaml").write_text(text)
    monkeypatch.setattr(agreement, "ARCHITECTURES", tmp_path / "architectures")
    found = Agreement(GRANITE, "q4f32_1", tmp_path / "built")
    session = found.session()
    got = np.concatenate(list(session.all_logits(session.add(), IDS)))
    assert error(got, found.expected(IDS)) < 1e-4
