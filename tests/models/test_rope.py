"""Rotary frequencies against transformers' own, for every kind of scaling."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from mlcbuild.models.config import normalise
from mlcbuild.models.rope import attention_factor, inverse_frequencies
from mlcbuild.models.structure import Structure
from tests.support import llama

TRAINED = 8192  # max_position_embeddings
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 2048}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1 + 0.01 * i for i in range(64)],
    "long_factor": [1 + 0.9 * i for i in range(64)],
    "original_max_position_embeddings": 4096,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
# settings, and the length of the text
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({"rope_type": "default", "rope_theta": 10000.0}, 100),
    "linear": ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, 100),
    "dynamic": (DYNAMIC, TRAINED),
    "dynamic_longer": (DYNAMIC, 3 * TRAINED),
    "llama3": (LLAMA3, 100),
    "yarn": (YARN, 100),
    "yarn_scaled": ({**YARN, "mscale": 0.707, "mscale_all_dim": 1.0, "beta_fast": 16, "truncate": False}, 100),
    "yarn_attention": ({**YARN, "attention_factor": 1.3}, 100),
    "yarn_by_lengths": ({**YARN, "factor": None}, 100),
    "longrope_short": (LONG, 4096),
    "longrope_long": (LONG, 4097),
    "longrope_attention": ({**LONG, "attention_factor": 1.1}, 100),
}


def structure_for(settings: dict[str, Any], length: int, **changes: Any) -> Structure:
    structure = llama.structure_of(llama.transformers_llama(head_dim=128))
    config = {"rope_parameters": settings, "max_position_embeddings": TRAINED}
    flat = normalise(config)
    return dataclasses.replace(
        structure,
        rope_theta=flat["rope_theta"],
        rope_scaling=flat["rope_scaling"],
        context_window_size=length,
        **changes,
    )


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_factors_are_those_of_transformers(name: str) -> None:
    """`length` is the text's there, and the library's longest one here."""
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    settings, length = CASES[name]
    config = LlamaConfig(head_dim=128, max_position_embeddings=TRAINED, rope_parameters=dict(settings))
    made = ROPE_INIT_FUNCTIONS.get(settings["rope_type"])
    plain = LlamaRotaryEmbedding.compute_default_rope_parameters
    expected, factor = made(config, torch.device("cpu"), length) if made else plain(config)
    structure = structure_for(settings, length)
    got = inverse_frequencies(structure)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.numpy(), rtol=5e-7)
    assert attention_factor(structure) == pytest.approx(factor, rel=1e-12)


def test_a_part_of_the_head_is_turned() -> None:
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    config = GPTNeoXConfig(hidden_size=256, num_attention_heads=2, rotary_pct=0.25)
    expected, _ = GPTNeoXRotaryEmbedding.compute_default_rope_parameters(config)
    got = inverse_frequencies(structure_for({"rope_theta": 10000.0}, 100, rotary_dim=32))
    np.testing.assert_allclose(got, expected.numpy(), rtol=3e-7)


def test_sliding_layers_may_have_a_theta_of_their_own() -> None:
    structure = structure_for(LLAMA3, 100, rope_local_theta=10000.0)
    plain = inverse_frequencies(structure_for({"rope_theta": 10000.0}, 100))
    assert (inverse_frequencies(structure, "sliding") == plain).all()
    assert not (inverse_frequencies(structure, "full") == plain).all()


def test_settings_in_the_form_of_older_checkpoints() -> None:
    """Phi-3's first ones: `su`, and the original length beside the scaling."""
    scaling = {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}
    config = {"rope_scaling": scaling, "original_max_position_embeddings": 4096, "max_position_embeddings": 131072}
    assert normalise(config)["rope_scaling"] == {
        "rope_type": "longrope",
        "short_factor": [1.0],
        "long_factor": [2.0],
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
    }


def test_settings_for_each_type_of_layer() -> None:
    """Gemma 3, as transformers 5 writes it."""
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    sliding = {"rope_type": "default", "rope_theta": 1e4}
    flat = normalise({"rope_parameters": {"full_attention": full, "sliding_attention": sliding}})
    assert flat["rope_theta"] == 1e6 and flat["rope_local_base_freq"] == 1e4
    assert flat["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
