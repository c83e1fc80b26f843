"""Cases of models whose heads have sinks, or are others in other layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.architectures.agreement import Case
from tests.architectures.cases import like_llama
from tests.architectures.family_cases import ONE_THETA, SCALES, SLIDING, YARN, _wrapped

BOTH = ("q0f32", "q4f32_1")
THETAS = [10000.0, 0, 5000.0]
PER_TYPE = {"full_attention": {**ONE_THETA, "partial_rotary_factor": 0.5}}
PER_TYPE |= {"sliding_attention": {**PER_TYPE["full_attention"], "rope_theta": 500.0}}


def _case(model_type: str, **changes: Any) -> Case:
    return replace(like_llama(model_type, **changes), quantizations=BOTH)


CASES: dict[str, Case] = {
    "gpt_oss": _case("gpt_oss", head_dim=32, num_local_experts=4, num_experts_per_tok=2, **SLIDING, swiglu_limit=0.5,
                     rope_parameters={**YARN, "truncate": False}),
    "granite_swa": _case("granite_swa", **SCALES, **SLIDING, layer_rope_theta=THETAS, attention_bias=True),
    "granitemoe_swa": _case("granitemoe_swa", **SCALES, **SLIDING, layer_rope_theta=THETAS, num_local_experts=4,
                            shared_intermediate_size=48),
    "flint": _case("flint", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40,
                   shared_expert_intermediate_size=48, mlp_only_layers=[0], sliding_window=16,
                   layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
    "mimo_v2_flash": _case("mimo_v2_flash", head_dim=24, v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2,
                           moe_intermediate_size=40, n_group=4, topk_group=2, attention_bias=True,
                           num_key_value_heads=1, **SLIDING, rope_parameters=PER_TYPE),
}  # fmt: skip
LLAMA4 = {
    "num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 40, "intermediate_size_mlp": 96,
    "num_local_experts": 4, "no_rope_layers": [1, 0, 1, 1], "moe_layers": [1, 2], "attention_chunk_size": 14,
    "floor_scale": 8,
}  # fmt: skip
CASES |= {
    "llama4_text": _case("llama4_text", **LLAMA4, num_experts_per_tok=2, attention_bias=True),
    "llama4_text-plain": replace(
        _case("llama4_text", **LLAMA4, use_qk_norm=False, attn_temperature_tuning=False), quantizations=("q0f32",)
    ),
}
LLAMA4_VISION = {"num_channels": 3, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
CASES |= {
    "llama4": _wrapped("llama4", "llama4_vision_model", CASES["llama4_text-plain"], LLAMA4_VISION),
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
LAGUNA_ROPE = {"full_attention": {**YARN, "partial_rotary_factor": 0.5}}
LAGUNA_ROPE |= {"sliding_attention": {**ONE_THETA, "rope_theta": 500.0, "partial_rotary_factor": 1.0}}
CASES |= {
    "cohere2_moe": _case("cohere2_moe", **MOE, **SLIDING, tie_word_embeddings=True, num_shared_experts=2,
                         mlp_layer_types=["dense", "sparse", "sparse"], prefix_dense_intermediate_size=72),
    "cohere2_moe-sigmoid": replace(
        _case("cohere2_moe", **MOE, rms_norm_eps=1e-6, num_shared_experts=1, expert_selection_fn="sigmoid",
              shared_expert_combination_strategy="sum", sliding_window=16, attention_bias=True),
        quantizations=("q0f32",)),
    "kolibri1": _case("kolibri1", num_local_experts=4, num_experts_per_tok=2, head_dim=16, **SLIDING,
                      moe_intermediate_size=40, shared_expert_intermediate_size=48,
                      intermediate_size="absent"),
    "laguna": _case("laguna", **MOE, **SLIDING, moe_intermediate_size=40, shared_expert_intermediate_size=48,
                    num_attention_heads_per_layer=[4, 8, 4], rope_parameters=LAGUNA_ROPE, attention_bias=True,
                    moe_router_logit_softcapping=0.8, moe_routed_scaling_factor=1.5),
    "laguna-elements": replace(
        _case("laguna", **MOE, **SLIDING, moe_intermediate_size=40, gating="per-element"), quantizations=("q0f32",)),
}  # fmt: skip
GEMMA4 = {
    "tie_word_embeddings": True, "hidden_size_per_layer_input": 0, "head_dim": 16, "global_head_dim": 32,
    "num_key_value_heads": 2, "final_logit_softcapping": 30.0, **SLIDING,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
CASES |= {
    "gemma4_text": _case("gemma4_text", **GEMMA4, attention_k_eq_v=True, num_global_key_value_heads=1,
                         attention_bias=True),
    "gemma4_text-experts": _case("gemma4_text", **GEMMA4, enable_moe_block=True, num_experts=4, top_k_experts=2,
                                 moe_intermediate_size=40),
}  # fmt: skip
CASES |= {
    "gemma4_text-shared": _case(
        "gemma4_text",
        **{**GEMMA4, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
           "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 96},
        num_kv_shared_layers=2, use_double_wide_mlp=True,
    ),
}  # fmt: skip
GEMMA3N = {
    "tie_word_embeddings": True, "head_dim": 16, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16, "vocab_size": 96,
    "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 80, "intermediate_size": [96, 64, 96, 96],
    "activation_sparsity_pattern": [0.7, 0.0, 0.0, 0.0],
}  # fmt: skip
CASES |= {"gemma3n_text": _case("gemma3n_text", **GEMMA3N)}
UNIFIED = {key: value for key, value in GEMMA4.items() if key != "hidden_size_per_layer_input"}
UNIFIED |= {"global_head_dim": 24}
CASES |= {
    "gemma4_unified_text": replace(_case("gemma4_unified_text", **UNIFIED), quantizations=("q0f32",)),
    "gemma4": _wrapped("gemma4", "gemma4_vision", CASES["gemma4_text"]),
    "gemma4_unified": _wrapped("gemma4_unified", "gemma4_unified_vision", _case("gemma4_unified_text", **UNIFIED)),
}
PERSIMMON = like_llama("persimmon", num_key_value_heads="absent").config
CASES |= {"fuyu": Case("fuyu", {**PERSIMMON, "model_type": "fuyu", "text_config": PERSIMMON}, quantizations=("q0f32",))}
EMU3_IMAGES = {
    "codebook_size": 8, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1],
    "num_res_blocks": 1, "attn_resolutions": [],
}  # fmt: skip
EMU3 = {"text_config": like_llama("emu3_text_model", bos_token_id=1, eos_token_id=2).config, "vq_config": EMU3_IMAGES}
EMU3 |= {"vocabulary_map": {"<image>": 5, "<|visual token 000000|>": 6}}
CASES |= {"emu3": Case("emu3", {"model_type": "emu3", **EMU3}, quantizations=("q0f32",))}
DBRX = {
    "model_type": "dbrx", "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 128, "vocab_size": 96,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.7, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
}  # fmt: skip
CASES |= {"dbrx": Case("dbrx", DBRX, quantizations=BOTH)}
