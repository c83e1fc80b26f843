"""Configs of published checkpoints have keys that mean nothing; those are passed over, and others are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models import architecture as architectures
from mlcbuild.models.structure import Structure
from mlcbuild.recipes.load import load

ARCHITECTURES = load(Path(__file__).parents[2]).architectures
# Keys and values as on the hub (2025), the tokens' ids and the names of files left out.
COMMON = {"attention_dropout": 0.0, "initializer_range": 0.02, "transformers_version": "4.45.0", "use_cache": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M-Instruct": {
        "model_type": "llama", "attention_bias": False, "hidden_act": "silu",
        "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}, "vocab_size": 49152,
    },
    "Phi-4-mini-instruct": {
        "model_type": "phi3", "attention_bias": False, "embd_pdrop": 0.0, "full_attn_mod": 1, "hidden_act": "silu",
        "hidden_size": 3072, "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False,
        "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144,
        "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        "tie_word_embeddings": True, "vocab_size": 200064,
    },
    "gemma-3-1b-it": {
        "model_type": "gemma3_text", "attention_bias": False, "attn_logit_softcapping": None,
        "cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
    },
    "OLMo-2-0425-1B-Instruct": {
        "model_type": "olmo2", "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 16, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
        "tie_word_embeddings": False, "vocab_size": 100352,
    },
    "starcoder2-15b": {
        "model_type": "starcoder2", "activation_function": "gelu", "attention_softmax_in_fp32": True,
        "embedding_dropout": 0.1, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 6144, "intermediate_size": 24576,
        "layer_norm_epsilon": 1e-05, "max_position_embeddings": 16384, "mlp_type": "default", "norm_epsilon": 1e-05,
        "norm_type": "layer_norm", "num_attention_heads": 48, "num_hidden_layers": 40, "num_key_value_heads": 4,
        "residual_dropout": 0.1, "rope_theta": 100000, "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True, "sliding_window": 4096, "use_bias": True, "vocab_size": 49152,
    },
    "bloom-560m": {
        "model_type": "bloom", "apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True, "hidden_dropout": 0.0, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True,
        "n_embed": 1024, "n_inner": None, "num_hidden_layers": 24, "num_attention_heads": 16, "offset_alibi": 100,
        "pretraining_tp": 1, "seq_length": 2048, "skip_bias_add": True, "skip_bias_add_qkv": False,
        "slow_but_exact": False, "unk_token_id": 0, "vocab_size": 250880,
    },
    "mpt-7b-chat": {
        "model_type": "mpt", "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4,
        "attn_config": {
            "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0, "clip_qkv": None,
            "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "prefix_lm": False, "qk_ln": False,
            "softmax_scale": None,
        },
        "init_config": {"name": "kaiming_normal_"}, "init_device": "cpu", "learned_pos_emb": True, "logit_scale": None,
        "max_seq_len": 2048, "n_heads": 32, "n_layers": 32, "no_bias": True, "norm_type": "low_precision_layernorm",
        "resid_pdrop": 0, "tokenizer_name": "EleutherAI/gpt-neox-20b", "verbose": 0, "vocab_size": 50432,
    },
    "Baichuan2-13B-Chat": {
        "model_type": "baichuan", "_from_model_config": True, "gradient_checkpointing": False, "hidden_act": "silu",
        "hidden_size": 5120, "intermediate_size": 13696, "model_max_length": 4096, "num_attention_heads": 40,
        "num_hidden_layers": 40, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "vocab_size": 125696,
        "z_loss_weight": 0,
    },
    "stablelm-2-12b-chat": {
        "model_type": "stablelm", "hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size": 5120,
        "intermediate_size": 13824, "layer_norm_eps": 1e-05, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "partial_rotary_factor": 0.25, "qk_layernorm": True,
        "rope_theta": 10000, "rotary_scaling_factor": 1.0, "tie_word_embeddings": False, "use_parallel_residual": True,
        "use_qkv_bias": False, "vocab_size": 100352,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
        "vocab_size": 151936,
    },
}  # fmt: skip


def resolved(config: dict[str, Any]) -> Structure:
    whole = {**COMMON, **config}
    return architectures.resolve(architectures.choose(ARCHITECTURES, whole), whole, {})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_understood(name: str) -> None:
    structure = resolved(CONFIGS[name])
    assert structure.num_hidden_layers == CONFIGS[name].get("num_hidden_layers", CONFIGS[name].get("n_layers"))
    biased = ("bloom-560m", "mpt-7b-chat", "Baichuan2-13B-Chat")
    assert (structure.rope, structure.alibi_bias_max) == (("none", 8.0) if name in biased else ("full", None))


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        (
            "SmolLM2-135M-Instruct",
            {"rope_interleaved": True},
            "rope_interleaved is True, but this architecture computes",
        ),
        (
            "Phi-4-mini-instruct",
            {"lm_head_bias": True},
            "lm_head_bias is True, but this architecture computes only False",
        ),
        ("Phi-4-mini-instruct", {"full_attn_mod": 2}, "full_attn_mod is 2, but this architecture computes only 1"),
        (
            "mpt-7b-chat",
            {"attn_config": {"alibi": False}},
            "attn_config.alibi is False, but this architecture computes",
        ),
        (
            "mpt-7b-chat",
            {"attn_config": {"alibi": True, "rope": True}},
            "attn_config.rope is True, but this architecture",
        ),
        ("starcoder2-15b", {"scale_attn_weights": False}, "scale_attn_weights is False, but this architecture"),
        ("Qwen3-0.6B", {"attention_sinks": 4}, "architecture `qwen3` does not know the key `attention_sinks` (4)"),
    ],
)
def test_what_would_change_the_numbers_is_not_passed_over(name: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(MlcBuildError) as error:
        resolved({**CONFIGS[name], **changes})
    assert text in str(error.value)
