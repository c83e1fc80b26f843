"""The models that come along: small files, each with its source, and nothing that needs a hub to be checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlcbuild.recipes.load import load
from mlcbuild.recipes.lockfile import key
from mlcbuild.recipes.types import Catalog

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes" / "models").glob("*.yaml"))


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load(ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_model_is_a_file_of_under_ten_lines(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) < 10
    assert lines[1].startswith("# "), "one line says what the model is"


def test_no_repository_is_two_models_by_accident(catalog: Catalog) -> None:
    """Models of one repository differ by what they say on top of it."""
    seen: dict[tuple[object, ...], str] = {}
    for name, model in catalog.models.items():
        if model.source.hf is None:
            continue
        told = (key(model.source), model.delta_of, model.lora, model.template, *sorted(model.overrides.items()))
        assert told not in seen, f"{name} and {seen.get(told)} are the same"
        seen[told] = name


def test_variants_share_their_weights_and_not_their_libraries(catalog: Catalog) -> None:
    model, variant = catalog.models["llama-3.2-1b-instruct"], catalog.models["llama-3.2-1b-instruct-1k"]
    assert model.source == variant.source and model.overrides != variant.overrides


def test_what_is_published_as_a_difference_names_its_base(catalog: Catalog) -> None:
    deltas = {name: str(model.delta_of) for name, model in catalog.models.items() if model.delta_of is not None}
    assert deltas == dict.fromkeys(("gorilla-7b-v0", "vicuna-7b-v1.1-delta"), "hf:huggyllama/llama-7b")
