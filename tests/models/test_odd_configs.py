"""A `config.json` with values that nobody expects: each is a sentence, none a traceback or a wrong library."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models import architecture
from mlcbuild.models.parameters import count, parameters
from mlcbuild.models.rope import attention_factor, inverse_frequencies
from tests.models.test_architecture import CONFIG
from tests.support import llama

LLAMA: dict[str, Any] = {**CONFIG, "num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 128}
MOE: dict[str, Any] = {
    **LLAMA, "model_type": "qwen2_moe", "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64, "norm_topk_prob": True, "decoder_sparse_step": 1, "hidden_act": "silu",
}  # fmt: skip
GEMMA3: dict[str, Any] = {
    **LLAMA, "model_type": "gemma3_text", "query_pre_attn_scalar": 16, "sliding_window": 32,
    "sliding_window_pattern": 2, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
RWKV6: dict[str, Any] = {
    "model_type": "rwkv6", "hidden_size": 64, "num_hidden_layers": 3, "head_size": 16, "vocab_size": 90,
    "layer_norm_epsilon": 1e-5, "head_size_divisor": 8, "rescale_every": 2, "intermediate_size": 96,
}  # fmt: skip

DEEPSEEK: dict[str, Any] = {
    **LLAMA, "model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32,
    "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 4, "topk_group": 2, "rope_interleave": True, "first_k_dense_replace": 1,
}  # fmt: skip
MAMBA2: dict[str, Any] = {  # as transformers 5 writes it
    "model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 32, "vocab_size": 90,
    "n_groups": 2, "state_size": 16, "conv_kernel": 4, "time_step_limit": [0.0, {"__float__": "Infinity"}],
    "use_conv_bias": True,
}  # fmt: skip
FALCON_MAMBA: dict[str, Any] = {
    "model_type": "falcon_mamba", "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 90, "expand": 2,
    "mixer_rms_eps": 1e-6, "time_step_rank": "auto",
}  # fmt: skip


def scaled(**settings: Any) -> dict[str, Any]:
    return {**LLAMA, "rope_parameters": {"rope_theta": 1e4, **settings}}


LLAMA3 = scaled(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
YARN = scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=32, mscale=0.7)
LONGROPE = scaled(
    rope_type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=32
)
DYNAMIC = scaled(rope_type="dynamic", factor=2.0)
CONFIGS = {
    "llama": LLAMA, "llama3": LLAMA3, "yarn": YARN, "longrope": LONGROPE, "dynamic": DYNAMIC,
    "qwen2_moe": MOE, "gemma3_text": GEMMA3, "rwkv6": RWKV6, "deepseek_v3": DEEPSEEK, "mamba2": MAMBA2,
    "falcon_mamba": FALCON_MAMBA,
}  # fmt: skip
ODD: tuple[Any, ...] = ("x", "64", -1, 0, 1.5, [], {}, ["a"], [1, 2], {"a": 1}, True, float("nan"), float("inf"))
ODD += (10**8,)


def places(config: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from places(value, (*at, key))


def with_value(config: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CONFIGS)
def test_any_value_of_any_key_is_refused_or_understood(name: str) -> None:
    config = CONFIGS[name]
    known = llama.architecture(config["model_type"])
    architecture.resolve(known, config, {})
    for place in places(config):
        for value in ODD:
            changed = with_value(config, place, value)
            try:
                structure = architecture.resolve(known, changed, {})
            except MlcBuildError:
                continue
            architecture.model_config(known, structure, changed)
            assert "NaN" not in json.dumps(structure.library_json()), (place, value)
            assert parameters(structure) and count(structure)
            if structure.rope == "full":
                kinds = {structure.layer_type(layer) for layer in range(structure.num_hidden_layers)}
                assert all(np.isfinite(inverse_frequencies(structure, kind)).all() for kind in kinds), (place, value)
                assert np.isfinite(attention_factor(structure))


@pytest.mark.parametrize(
    ("config", "place", "value", "problem"),
    [
        (LLAMA, ("rope_parameters",), "big", "rope_parameters is 'big', expected an object"),
        (LLAMA, ("rope_scaling",), 4, "rope_scaling is 4, expected an object"),
        (LLAMA, ("rope_scaling",), {"factor": 2.0}, "rope_scaling has a `factor` and no `rope_type`: add it"),
        (LLAMA, ("rope_theta",), "10000", "rope_theta is '10000', expected a number above 1"),
        (LLAMA, ("rms_norm_eps",), -1e-5, "norm epsilon is -1e-05, expected a number of at least 0"),
        (LLAMA, ("rms_norm_eps",), True, "norm epsilon is True, expected a number of at least 0"),
        (LLAMA, ("tie_word_embeddings",), "false", "tie_word_embeddings is 'false', expected true or false"),
        (LLAMA, ("max_position_embeddings",), -1, "context_window_size is -1, expected a whole number of at least 1"),
        (LLAMA3, ("rope_parameters", "rope_type"), ["llama3"], "rope_type is ['llama3'], expected a text"),
        (LLAMA3, ("rope_parameters", "factor"), None, "rope scaling `llama3` needs the key 'factor'"),
        (LLAMA3, ("rope_parameters", "factor"), "8", "`llama3`: factor is '8', expected a number above 0"),
        (LLAMA3, ("rope_parameters", "low_freq_factor"), 4.0, "low_freq_factor is not below high_freq_factor"),
        (LLAMA3, ("rope_parameters", "slope"), 2, "rope scaling `llama3` does not know the key 'slope' (2), which may"),
        (scaled(rope_type="yarn"), ("rope_parameters", "factor"), None, "rope scaling `yarn` needs the key 'factor'"),
        (YARN, ("rope_parameters", "mscale"), "x", "`yarn`: mscale is 'x', expected a number of at least 0"),
        (LONGROPE, ("rope_parameters", "long_factor"), ["a"], "`longrope` has ['a'] in 'long_factor', expected"),
        (LONGROPE, ("rope_parameters", "short_factor"), [1.0, 2.0],
         "has 2 numbers in 'short_factor', expected 8: one for each pair of the 16 rotary dimensions"),
        (GEMMA3, ("rope_parameters", "sliding_attention"), 1, "rope_parameters.sliding_attention is 1, expected an"),
        (GEMMA3, ("final_logit_softcapping",), 0, "final_logit_softcapping is 0, expected a number above 0"),
        (MOE, ("shared_expert_intermediate_size",), 1.5, "shared_expert_intermediate_size is 1.5, expected a whole"),
        (MOE, ("norm_topk_prob",), "no", "norm_topk_prob is 'no', expected true or false"),
        (RWKV6, ("rescale_every",), "x", "rescale_every is 'x', expected a whole number"),
        (MAMBA2, ("conv_kernel",), 1, "conv_kernel is 1, expected a whole number of at least 2"),
        (MAMBA2, ("time_step_limit",), [2, 1], "time_step_limits is (2, 1), expected two numbers, the least and the"),
        (MAMBA2, ("n_groups",), 3, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        # FAULTS.md D: planning went through the layers one by one, and did not come back.
        (LLAMA, ("num_hidden_layers",), 10**8, "num_hidden_layers is 100,000,000, and models of at most 4,096 are"),
        (GEMMA3, ("num_hidden_layers",), 10**8, "num_hidden_layers is 100,000,000, and models of at most 4,096 are"),
        (MOE, ("num_experts",), 10**6, "2 layers of 1,000,000 experts, and models of at most 500,000 experts in all"),
        (LLAMA, ("head_dim",), 10**6, "head_dim is 1,000,000, and models of at most 65,536 are built"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(config: dict[str, Any], place: tuple[str, ...], value: Any, problem: str) -> None:
    """FAULTS C (MLX) and D (10^8 layers; siblings: experts, heads), and values of other kinds."""
    changed = with_value(config, place, value)
    with pytest.raises(MlcBuildError) as error:
        architecture.resolve(llama.architecture(config["model_type"]), changed, {})
    assert problem in str(error.value)


def test_a_model_that_sees_what_comes_after_is_refused() -> None:
    for name in ("gemma", "gemma2", "gemma3_text"):
        with pytest.raises(MlcBuildError, match="use_bidirectional_attention is True, but this architecture computes"):
            architecture.resolve(llama.architecture(name), {**GEMMA3, "use_bidirectional_attention": True}, {})


def test_a_scaling_of_layers_with_a_window_is_refused() -> None:
    """FAULTS A12: it was dropped."""
    config = copy.deepcopy(GEMMA3)
    config["rope_parameters"]["sliding_attention"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    with pytest.raises(MlcBuildError, match="sliding_attention has the rope_type 'linear', but only layers of full"):
        architecture.resolve(llama.architecture("gemma3_text"), config, {})
