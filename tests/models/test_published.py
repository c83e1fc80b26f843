"""Weights and libraries are interchangeable with mlc-ai's: the same parameters in the same order, shapes and dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mlcbuild.models import architecture as architectures
from mlcbuild.models.parameters import parameters
from mlcbuild.quantization.schemes import quantized_parameters
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import Catalog

PUBLISHED: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load(Path(__file__).parents[2])


def listed(lines: list[str], layers: int) -> list[str]:
    """The lines with the block of those that have `{i}` repeated for each layer."""
    block = [line for line in lines if "{i}" in line]
    start = lines.index(block[0])
    repeated = [line.replace("{i}", str(i)) for i in range(layers) for line in block]
    return [line for line in lines[:start] if line not in block] + repeated + lines[start + len(block) :]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_library(name: str, catalog: Catalog) -> None:
    published = PUBLISHED[name]
    config = published["config"]
    architecture = architectures.choose(catalog.architectures, config)
    structure = architectures.resolve(architecture, config, {})
    made = quantized_parameters(parameters(structure), catalog.quantizations[published["quantization"]])
    vocabulary = structure.vocab_size
    ours = [f"{p.name} {p.dtype} {' '.join('V' if n == vocabulary else str(n) for n in p.shape)}" for p in made]
    assert ours == listed(published["parameters"], structure.num_hidden_layers)
    assert architecture.model_type == published["model_type"]
