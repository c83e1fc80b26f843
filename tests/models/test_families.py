"""What single architectures refuse or have where config.json is silent: their own configs, each with a change."""

from __future__ import annotations

from typing import Any

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.architecture import resolve
from mlcbuild.models.structure import Structure
from tests.architectures import family_cases, hybrid_cases, sink_cases
from tests.architectures.agreement import config_of
from tests.support.architectures import known

CASES = {**family_cases.CASES, **hybrid_cases.CASES, **sink_cases.CASES}
ARCHITECTURES = known()
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}  # fmt: skip
SIX = {"num_hidden_layers": 6, "layer_types": None, "num_attention_heads": 6, "num_key_value_heads": 3}
ABSENT = object()
SILENT = {"rope_parameters": ABSENT, "rope_scaling": ABSENT}


def structure(name: str, **changes: Any) -> Structure:
    config = {key: value for key, value in {**config_of(CASES[name]), **changes}.items() if value is not ABSENT}
    return resolve(ARCHITECTURES[CASES[name].architecture], config, {})


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("gemma4_text", {**SIX, "num_global_key_value_heads": 2, "attention_k_eq_v": True},
         "config.json: layer 5: num_key_value_heads 2 does not divide the 3 of another layer"),
        ("laguna", {"num_attention_heads_per_layer": [6, 8, 6], "num_key_value_heads": 4},
         "config.json: layer 2: num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ("laguna", {"head_dim": 22},
         "config.json: layer 1: rotary_dim is 11, expected an even number up to head_dim 22"),
        ("laguna", {"layer_types": ["full_attention"]},
         "config.json: `layer_types` has 1 values, expected one for each of 3 layers"),
        ("granite_swa", {"layer_rope_theta": [1e4, 1e4]},
         "config.json: `layer_rope_theta` has 2 values, expected one for each of "),
        ("granitemoehybrid", {"mamba_n_heads": 5, "mamba_n_groups": 2, "mamba_d_head": 16},
         "config.json: state_heads 5 is not a multiple of state_groups 2"),
        ("qwen3_5_text", {"linear_num_value_heads": 6, "linear_num_key_heads": 4},
         "config.json: state_heads 6 is not a multiple of state_groups 4"),
        ("granitemoehybrid", {"layer_types": ["mamba"] * 4},
         "config.json: of its layers, none has attention: a hybrid is built with layers of both"),
        ("lfm2", {"layer_types": ["full_attention"] * 4},
         "config.json: of its layers, all have attention and none a state: a hybrid is built with layers of both"),
        ("falcon_h1", {"ssm_multipliers": 0.5}, "config.json: mixer_scales is 0.5, expected five numbers"),
        ("gemma4_text", {"rope_parameters": {"full_attention": {**PROPORTIONAL, "rope_theta": 1e6},
                         "sliding_attention": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}},
         "does not know the key `rope_parameters.sliding_attention.partial_rotary_factor` (0.5), which may change"),
        ("gemma4_text", {"per_layer_config": {"first": {"head_dim": 32}, "1": {"head_dim": 32}}},
         "per_layer_config is of first, 1, expected numbers of layers, each once and below "),
        ("gemma4_text", {"per_layer_config": {"1": {"hidden_size": 32}}},
         "does not know the key `per_layer_config.hidden_size` ([null, 32]), which may change what the model"),
        ("gemma4_text", {"per_layer_config": {"1": {"head_dim": 32}}, "num_hidden_layers": ABSENT},
         "config.json: per_layer_config needs num_hidden_layers, a whole number"),
        ("mimo_v2_flash", {"hybrid_layer_pattern": [0, 1]},
         "architecture `mimo_v2_flash` does not know the key `hybrid_layer_pattern`"),
    ],
)  # fmt: skip
def test_what_it_cannot_be_is_refused(name: str, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(MlcBuildError) as error:
        structure(name, **changes)
    assert problem in str(error.value)
    assert len(set(lines := str(error.value).splitlines())) == len(lines)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("gpt_oss", SILENT, {"rope_scaling": YARN, "rope_theta": 150000.0}),
        ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"rope_scaling": None}),
        ("gemma4_text", SILENT, {"rope_scaling": PROPORTIONAL, "rope_theta": 1e6, "rope_local_theta": 1e4}),
        ("olmo_hybrid", SILENT, {"rope": "full", "rope_theta": 1e4}),
        ("olmo_hybrid", {"rope_parameters": None}, {"rope": "full", "rope_theta": 1e4}),
        ("olmo_hybrid", {"rope_parameters": {"rope_theta": None}}, {"rope": "none"}),
        ("mimo_v2_flash", {"sliding_window": 12, "sliding_window_size": 12}, {"sliding_window_size": 13}),
        ("mimo_v2_flash", {"sliding_window": 12}, {"sliding_window_size": 12}),
        ("llama4_text", {}, {"scoring": "logits"}),
        ("cohere2_moe", {"expert_selection_fn": "sigmoid"}, {"scoring": "logits"}),
    ],
)
def test_what_it_is_where_the_config_is_silent(name: str, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    """As transformers' classes have it in their __post_init__."""
    found = structure(name, **changes)
    assert {field: getattr(found, field) for field in expected} == expected


def test_padded_numbers_of_layers() -> None:
    """transformers 5 writes "05" where there are ten layers or more."""
    padded = {"05": {"head_dim": 32}, "11": {"head_dim": 64}}
    found = structure("gemma4_text", num_hidden_layers=12, layer_types=None, per_layer_config=padded)
    assert [found.at(layer).qk_head_dim for layer in (4, 5, 11)] == [16, 32, 64]
