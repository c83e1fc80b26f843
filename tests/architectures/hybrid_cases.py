"""A case of each hybrid: layers with attention, and layers with a state of one size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.architectures import family_cases
from tests.architectures.agreement import IDS, Case
from tests.architectures.cases import like_llama


def _case(model_type: str, **changes: Any) -> Case:
    return like_llama(model_type, **{"num_hidden_layers": 4, **changes})


FACTORS = ("full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor")
CONV = {"layer_types": ["conv", "full_attention", "conv", "conv"]}
CASES: dict[str, Case] = {
    "lfm2": _case("lfm2", **CONV, conv_bias=True, block_multiple_of=32, tie_word_embeddings="absent"),
    "lfm2_moe": _case(
        "lfm2_moe",
        **CONV,
        num_dense_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        conv_L_cache=4,
    ),
}
CASES["lfm3"] = _case(
    "lfm3",
    head_dim=16,
    layer_types=["conv", "full_attention", "sliding_attention", "conv"],
    sliding_window=10,
    attention_bias=True,
    tie_word_embeddings="absent",
)
STATES = {"mamba_n_heads": 4, "mamba_d_state": 9, "mamba_n_groups": 2}
SCALES = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.1, "logits_scaling": 4.0}
TWO = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}  # deltas lose by layer
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]}
CASES |= {
    "bamba": _case("bamba", **STATES, attn_layer_indices=[1], attention_bias=True, mlp_bias=True, mamba_proj_bias=True),
    "granitemoehybrid": _case(
        "granitemoehybrid", **STATES, **SCALES, **LINEAR, num_local_experts=4, shared_intermediate_size=48
    ),
    "granitemoehybrid-dense": replace(
        _case(
            "granitemoehybrid",
            **STATES,
            **LINEAR,
            num_local_experts=0,
            shared_intermediate_size=48,
            position_embedding_type="rope",
            time_step_limit=[0.6, 0.9],
            mamba_conv_bias=False,
        ),
        quantizations=("q0f32",),
    ),
    "jamba": _case(
        "jamba",
        attn_layer_period=3,
        attn_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=5,
        mamba_dt_rank=8,
        mamba_proj_bias=True,
    ),
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 20,
    "head_dim": 32,
    "attention_bias": True,
}
MANY = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
IMAGES = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}


def _wrapped(name: str) -> Case:
    config = {"model_type": name, "text_config": dict(CASES[f"{name}_text"].config), "vision_config": IMAGES}
    return Case(name, {**config, "tie_word_embeddings": False}, quantizations=("q0f32",))


CASES |= {
    "qwen3_next": _case("qwen3_next", **DELTA, **TWO, **MANY, mlp_only_layers=[1], linear_conv_kernel_dim=3),
    "qwen3_5_text": _case("qwen3_5_text", **DELTA, **LINEAR),
    "qwen3_5_moe_text": replace(_case("qwen3_5_moe_text", **DELTA, **MANY, **LINEAR), quantizations=("q0f32",)),
}
HASHED = {"ple_layer_ids": [2, 1], "ple_embed_dim": 128, "heads_per_ngram": 2, "ngram_vocab_size_base": 50}
HASHED |= {"split_ngram_parts": 3}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 96,
    "indexer_compress_ratio": 4,
}
CASES |= {
    "qwen4_exp_text": _case(
        "qwen4_exp_text",
        **DELTA,
        **MANY,
        **TWO,
        **INDEXER,
        hc_count=3,
        hc_lowrank=32,
        output_gate_type="sigmoid",
    ),
    "qwen4_exp_text-ngrams": _case(
        "qwen4_exp_text",
        **{**DELTA, **MANY, **INDEXER, **HASHED},
        layer_types=["linear_attention", "linear_attention", "indexed_attention"],
        num_hidden_layers=3,
        hc_count=2,
        hc_lowrank=32,
        eos_token_id=IDS[9],
    ),
}
CASES |= {name: _wrapped(name) for name in ("qwen3_5", "qwen3_5_moe", "qwen4_exp")}
THREE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}  # one position without images
SEEING = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
CASES["qwen2_5_vl"] = Case(
    "qwen2",
    {
        "model_type": "qwen2_5_vl",
        "text_config": like_llama("qwen2_5_vl_text", rope_parameters=THREE, rms_norm_eps=1e-5).config,
        "vision_config": {**SEEING, "fullatt_block_indexes": [0]},
        "tie_word_embeddings": False,
    },
    quantizations=("q0f32",),
)
VIEW = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
for _name in ("aya_vision", "cohere2_vision"):
    CASES[_name] = Case(
        _name,
        {
            "model_type": _name,
            "text_config": dict(family_cases.CASES["cohere2"].config),
            "vision_config": {**VIEW, "num_hidden_layers": 1},
        },
        quantizations=("q0f32",),
    )
HEARD = {"input_dim": 8, "num_layers": 1, "hidden_dim": 32, "num_heads": 2, "dim_head": 16, "output_dim": 8}
for _name in ("granite_speech", "granite_speech_plus"):
    CASES[_name] = Case(
        "granite_speech",
        {
            "model_type": _name,
            "text_config": dict(family_cases.CASES["granite"].config),
            "encoder_config": HEARD,
            "projector_config": {**VIEW, "num_hidden_layers": 1},
            "tie_word_embeddings": False,
        },
        quantizations=("q0f32",),
    )
CASES["mllama"] = Case(
    "mllama",
    {
        "model_type": "mllama",
        "text_config": like_llama(
            "mllama_text_model", num_hidden_layers=5, cross_attention_layers=[1, 4], rms_norm_eps=1e-5, pad_token_id=0
        ).config,
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_global_layers": 1,
            "attention_heads": 2, "vision_output_dim": 64, "image_size": 28, "patch_size": 14,
            "intermediate_layers_indices": [0],
        },
    },
    quantizations=("q0f32",),
)  # fmt: skip
CASES |= {
    "falcon_h1": _case(
        "falcon_h1",
        **{**STATES, "mamba_d_ssm": 48},
        attention_bias=True,
        mlp_bias=True,
        mamba_proj_bias=True,
        projectors_bias=True,
        embedding_multiplier=3.0,
        lm_head_multiplier=0.5,
        mlp_multipliers=[0.7, 0.6],
        key_multiplier=0.8,
        attention_in_multiplier=0.9,
        attention_out_multiplier=1.2,
        ssm_multipliers=[0.5, 0.6, 0.7, 0.8, 0.9],
        ssm_in_multiplier=1.1,
        ssm_out_multiplier=1.3,
    ),
    "falcon_h1-norm": replace(_case("falcon_h1", **STATES, mamba_rms_norm=True), quantizations=("q0f32",)),
}
CASES |= {
    "olmo_hybrid": _case(
        "olmo_hybrid", **TWO, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=24,
        attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "kimi_linear": _case(
        "kimi_linear", **LINEAR, num_local_experts=8, n_group=4, topk_group=2, moe_intermediate_size=32,
        kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=24, v_head_dim=20, linear_head_dim=24, linear_num_heads=3,
        num_key_value_heads=4, num_experts_per_tok=3,
    ),
    "lara_mini": _case(
        "lara_mini", **{**DELTA, "head_dim": 16}, num_hidden_layers=3, num_experts=4, num_experts_per_tok=2,
        layer_types=["linear_attention", "sliding_attention", "full_attention"], sliding_window=10,
        moe_intermediate_size=32, shared_expert_intermediate_size=48, intermediate_size="absent",
    ),
    "bailing_hybrid": _case(
        "bailing_hybrid", **LINEAR, num_experts=8, num_expert_group=4, topk_group=2, moe_intermediate_size=32,
        kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=24, v_head_dim=20, head_dim=24,
        num_key_value_heads=4, num_experts_per_token=3, first_k_dense_replace=1,
    ),
    "minimax": _case(
        "minimax", num_local_experts=4, head_dim=24, num_hidden_layers=3, **dict.fromkeys(FACTORS, 3.5),
        linear_attn_beta_factor=0.8, full_attn_beta_factor=0.9, mlp_beta_factor=0.7, rms_norm_eps=1e-5,
    ),
    "recurrent_gemma": _case(
        "recurrent_gemma", attention_window_size=10, lru_width=80, intermediate_size=128, attention_bias=True,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
ZAYA = {
    "head_dim": 24,
    "num_experts": 4,
    "moe_intermediate_size": 40,
    "router_hidden_size": 40,
    "intermediate_size": "absent",
}
CASES |= {
    "zaya": _case("zaya", **ZAYA, attention_bias=True, lm_head_bias=True),
    "zaya-sliding": replace(
        _case(
            "zaya", **ZAYA, layer_types=["hybrid", "hybrid_sliding"] * 2, sliding_window=10, cca_time0=3, cca_time1=4,
            tie_word_embeddings=True,
        ),
        quantizations=("q0f32",),
    ),
}  # fmt: skip
ZAMBA2 = {
    "num_key_value_heads": 4, "n_mamba_heads": 4, "mamba_d_state": 9, "mamba_ngroups": 2, "adapter_rank": 32,
    "tie_word_embeddings": True,
}  # fmt: skip
CASES |= {
    "zamba2": _case(
        "zamba2", **ZAMBA2, layers_block_type=["mamba", *["hybrid"] * 3], num_mem_blocks=2,
        use_shared_attention_adapter=True, use_mem_rope=True,
    ),
    "zamba2-plain": replace(
        _case("zamba2", **ZAMBA2, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], add_bias_linear=True),
        quantizations=("q0f32",),
    ),
}  # fmt: skip
ZAMBA = {  # channels of two heads that fill no vector, no task
    "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "n_mamba_heads": 2, "mamba_d_state": 5,
    "mamba_dt_rank": 8, "tie_word_embeddings": True, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
}  # fmt: skip
CASES |= {
    "zamba": replace(_case("zamba", **ZAMBA), noise=3),  # transformers is off by as much of itself in float64
    "zamba-biases": replace(
        _case("zamba", **ZAMBA | {"hidden_size": 92, "mamba_dt_rank": "auto", "n_mamba_heads": 4, "mamba_expand": 3,
              "layers_block_type": ["hybrid"] * 4, "mamba_proj_bias": True, "mamba_conv_bias": False}),
        quantizations=("q0f32",), noise=3,
    ),
}  # fmt: skip
NEMOTRON = {
    "num_hidden_layers": "absent", "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 20, "ssm_state_size": 9,
    "n_groups": 2, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40, "routed_scaling_factor": 1.5,
}  # fmt: skip
CASES |= {
    "nemotron_h": _case("nemotron_h", **NEMOTRON, layers_block_type=["mamba", "moe", "attention", "mlp", "mamba"]),
    "nemotron_h-latent": replace(
        _case(
            "nemotron_h", **NEMOTRON, layers_block_type=["mamba", "moe", "attention"], moe_latent_size=32,
            mlp_bias=True, use_bias=True, use_conv_bias=False,
        ),
        quantizations=("q0f32",),
    ),
}  # fmt: skip
# The two forms of the delta rule that transformers has differ by 3e-5 to 2e-4 of the logits' deviation.
DELTA_NETS = (
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_text",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen4_exp",
    "qwen4_exp_text",
    "qwen4_exp_text-ngrams",
    "olmo_hybrid",
    "kimi_linear",
    "lara_mini",
    "bailing_hybrid",
)
# What attention returns is normed without a residual, which makes rounding larger: transformers is 9e-5 from float64.
CASES |= {name: replace(CASES[name], noise=10) for name in (*DELTA_NETS, "zamba2", "zamba2-plain")}
