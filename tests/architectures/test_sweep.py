"""Every language model that transformers knows is compared with ours, or stands in refused.yaml with what it lacks."""

from __future__ import annotations

from pathlib import Path

import transformers
import yaml

from mlcbuild.models import wrappers
from tests.architectures.agreement import known_architectures
from tests.architectures.test_agreement import CASES

REFUSED: dict[str, list[str]] = yaml.safe_load((Path(__file__).parent / "refused.yaml").read_text())


def test_every_language_model_of_transformers_is_compared_or_refused_with_a_reason() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert transformers.__version__.startswith("5.24."), "look through the new version's models, then change this line"
    refused = [name for names in REFUSED.values() for name in names]
    compared = {case.config["model_type"] for case in CASES.values() if case.shapes is None} | {"gpt-sw3"}  # it is gpt2
    compared |= {*wrappers.known()}  # by test_wrappers.py; gemma3n and kimi_k25 by their tensors' names and shapes
    assert sorted(refused) == sorted(set(refused))
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - compared == set(refused)


def test_what_is_refused_is_an_unknown_architecture() -> None:
    """But encoders, which are there for the vectors of texts."""
    decoders = [each for each in known_architectures().values() if each.data.get("kind") != "encoder"]
    known = {name for each in decoders for name in each.match.get("model_type", ())}
    assert known.isdisjoint(name for names in REFUSED.values() for name in names)
