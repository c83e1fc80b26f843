"""Rotary frequencies against transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.rope import inverse_frequencies
from tests.support import llama

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("settings", [{"rope_type": "default", "rope_theta": 10000.0}, LLAMA3])
def test_frequencies_are_those_of_transformers(settings: dict[str, Any]) -> None:
    model = llama.transformers_llama(head_dim=128, rope_parameters=settings)
    expected = model.model.rotary_emb.inv_freq.numpy()
    got = inverse_frequencies(llama.structure_of(model))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=3e-7)


def test_a_scaling_without_its_factor() -> None:
    settings = {key: value for key, value in LLAMA3.items() if key != "factor"}
    structure = llama.structure_of(llama.transformers_llama())
    broken = type(structure)(**{**structure.__dict__, "rope_scaling": settings})
    with pytest.raises(MlcBuildError, match="rope scaling `llama3` needs the key 'factor'"):
        inverse_frequencies(broken)
