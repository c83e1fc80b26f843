"""A case of each architecture that is another one but for a few lines, and of the choices that its checkpoints use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.architectures import references
from tests.architectures.agreement import Case
from tests.architectures.cases import GPT2_SIZES, like_llama

SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SCALES = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.1, "logits_scaling": 4.0}
ONE_THETA = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
NEO = {
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), "absent"),
    "num_layers": 3,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1], [["global"], 1]],
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODERN = dict.fromkeys(("num_key_value_heads", "tie_word_embeddings"), "absent")
FALCON = {"num_key_value_heads": "absent", "intermediate_size": "absent", "ffn_hidden_size": 96}
TERNARY = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
BIASES = {"attention_bias": True, "mlp_bias": True}


def _case(model_type: str, **changes: Any) -> Case:
    return replace(like_llama(model_type, **changes), quantizations=("q0f32",))


def _gpt(model_type: str, **changes: Any) -> Case:
    config = {"model_type": model_type, **GPT2_SIZES, **changes}
    found = {key: value for key, value in config.items() if value != "absent"}
    return Case(model_type, found, quantizations=("q0f32",))


CASES: dict[str, Case] = {
    "llama-biases": _case("llama", **BIASES, hidden_act="gelu"),
    "arcee": _case("arcee", **BIASES),
    "bitnet": _case("bitnet", attention_bias=True),
    # A number that float32 has a hair away from another rounding moves logits by a step of one input: 1 / 127.
    "bitnet-ternary": Case(
        "bitnet",
        {**like_llama("bitnet").config, "quantization_config": TERNARY},
        references.bitnet_shapes,
        references.bitnet,
        quantizations=("q0f32",),
        noise=500,
    ),
    "cwm": _case("cwm", head_dim=16, **SLIDING, rope_parameters=ONE_THETA),
    "ernie4_5": _case("ernie4_5", use_bias=True, head_dim=16),
    "diffllama": replace(_case("diffllama", attention_bias=True), quantizations=("q0f32", "q4f32_1")),
    "diffllama-40-wide": _case("diffllama", num_key_value_heads=4, head_dim=40),
    "doge": _case("doge", attention_bias=True, mlp_bias=True),
    "doge-moe": replace(
        _case("doge", is_moe=True, num_experts=40, num_experts_per_tok=7), quantizations=("q0f32", "q4f32_1")
    ),
    "exaone": _case("exaone", num_hidden_layers="absent", num_layers=3, head_dim=16),
    "falcon": _case("falcon", **FALCON),
    "falcon-40b": _case("falcon", **FALCON, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "falcon-11b": _case("falcon", **FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    "falcon-sequential": _case("falcon", **FALCON, multi_query=False, parallel_attn=False),
    "flex_olmo": _case("flex_olmo", **EXPERTS),
    "glm": _case("glm", head_dim=16),
    "glm4": _case("glm4", head_dim=16),
    "gpt_neo": _case("gpt_neo", window_size=16, **NEO),
    "granite": _case("granite", **SCALES),
    "granitemoe": _case("granitemoe", **SCALES, num_local_experts=4),
    "granitemoeshared": _case("granitemoeshared", **SCALES, num_local_experts=4, shared_intermediate_size=48),
    "helium": _case("helium", head_dim=16, attention_bias=True),
    "hyperclovax": _case("hyperclovax", **SCALES, head_dim=16),
    "hyperclovax-pre": _case("hyperclovax", head_dim=16, use_post_norm=False),
    "jetmoe": replace(
        _case("jetmoe", num_attention_heads="absent", kv_channels=16, num_local_experts=4, rms_norm_eps=1e-3),
        quantizations=("q0f32", "q4f32_1"),
    ),
    "internlm3": _case("internlm3", head_dim=16),
    "iquestcoder": _case("iquestcoder", head_dim=16),
    "jais2": _case("jais2", head_dim=16),
    "mellum": _case(
        "mellum", head_dim=16, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, **SLIDING
    ),
    "ministral": _case("ministral", head_dim=16, **SLIDING),
    "olmo3": _case("olmo3", **SLIDING, rope_parameters={"full_attention": YARN, "sliding_attention": ONE_THETA}),
    "olmoe": _case("olmoe", **EXPERTS),
    "persimmon": _case("persimmon", num_key_value_heads="absent"),
    "seed_oss": _case("seed_oss", head_dim=16, attention_out_bias=True, mlp_bias=True),
    "vaultgemma": _case("vaultgemma", tie_word_embeddings=True, head_dim=16, query_pre_attn_scalar=24, **SLIDING),
    "qwen2_moe-no-bias": _case(
        "qwen2_moe", **EXPERTS, moe_intermediate_size=40, shared_expert_intermediate_size=48, qkv_bias=False
    ),
}
RANKS = {"q_lora_rank": 24, "kv_lora_rank": 32}
LATENT = {**RANKS, "num_key_value_heads": 4, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20}
ODD = {"num_key_value_heads": 3, "kv_lora_rank": 35, "qk_rope_head_dim": 6, "qk_nope_head_dim": 17, "v_head_dim": 11}
LONGCAT: dict[str, Any] = {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 40, "head_dim": 8}
LONGCAT |= dict.fromkeys(("num_hidden_layers", "intermediate_size"), "absent")
V2 = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "first_k_dense_replace": 1}
V3 = {**V2, "moe_intermediate_size": 24}
DEEPSEEK_YARN = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}
INDEXER = {"index_topk": 96, "index_n_heads": 2, "index_head_dim": 16}  # of a text of 96 tokens, it chooses all
NEXT = {"head_dim": 16, "moe_intermediate_size": 40, "num_experts_per_tok": 2}
CASES |= {
    "gemma-untied": _case("gemma", head_dim=16),
    "cohere-biases": _case("cohere", tie_word_embeddings=True, attention_bias=True),
    "smollm3": _case("smollm3", no_rope_layers=[1, 0, 1]),
    "cohere2": _case("cohere2", tie_word_embeddings=True, **SLIDING),
    "cohere_compass_text": _case(
        "cohere_compass_text",
        **SLIDING,
        attention_bias=True,
        rope_parameters={"full_attention": None, "sliding_attention": {**ONE_THETA, "rope_theta": 3000.0}},
    ),
    "cohere_compass_text-turned": _case(
        "cohere_compass_text",
        **SLIDING,
        logit_scale=0.25,
        tie_word_embeddings=True,
        rope_parameters={"full_attention": ONE_THETA, "sliding_attention": {**ONE_THETA, "rope_theta": 3000.0}},
    ),
    "exaone4": _case("exaone4", **SLIDING),
    "exaone4-full": _case("exaone4", sliding_window=None, layer_types=["full_attention"] * 3),
    "glm4_moe": _case(
        "glm4_moe", **NEXT, n_routed_experts=8, n_group=4, topk_group=2, use_qk_norm=True, attention_bias=True
    ),
    "dots1": _case(
        "dots1",
        **NEXT,
        n_routed_experts=4,
        n_shared_experts=2,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        attention_bias=True,
    ),
    "solar_open": _case("solar_open", **NEXT, n_routed_experts=4, routed_scaling_factor=1.5, attention_bias=True),
    "sarvam_moe": _case("sarvam_moe", **NEXT, n_routed_experts=4),
    "beam": _case(
        "beam",
        **NEXT,
        num_experts=8,
        n_group=4,
        topk_group=2,
        attention_bias=True,
        **SLIDING,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "exaone_moe": _case("exaone_moe", **NEXT, num_experts=4, **SLIDING),
    "hy_v3": _case("hy_v3", **NEXT, num_experts=4, attention_bias=True),
    "minimax_m2": _case("minimax_m2", head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "ernie4_5_moe": _case(
        "ernie4_5_moe", use_bias=True, moe_num_experts=4, moe_k=2, moe_intermediate_size=40, moe_layer_end_index=1
    ),
    "phimoe": _case("phimoe", num_local_experts=4, attention_bias=True, lm_head_bias=True),
    "deepseek_v2": _case("deepseek_v2", **LATENT, **V2, topk_method="group_limited_greedy", n_group=4, topk_group=2),
    "deepseek_v2-lite": _case(
        "deepseek_v2", **{**LATENT, "q_lora_rank": None, "v_head_dim": 36}, **V2, attention_bias=True
    ),
    "deepseek_v3": replace(
        _case("deepseek_v3", **LATENT, **V3, n_group=4, topk_group=2, rope_parameters=DEEPSEEK_YARN),
        quantizations=("q0f32", "q4f32_1"),
    ),
    # Rows of latents of odd widths and heads; too few heads for latents to be fewer numbers than they.
    "deepseek_v3-odd": replace(
        _case("deepseek_v3", **{**LATENT, **ODD}, **V3, hidden_size=48, num_attention_heads=3, n_group=1, topk_group=1),
        quantizations=("q0f32", "q4f32_1"),
    ),
    "deepseek_v2-whole": _case(
        "deepseek_v2", **{**LATENT, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 120}, **V2
    ),
    "deepseek_v3-plain": _case("deepseek_v3", **LATENT, **V3, n_group=1, topk_group=1, rope_interleave=False),
    "youtu": _case("youtu", **LATENT, tie_word_embeddings=True, pad_token_id=None),
    "minicpm3": _case("minicpm3", **LATENT, scale_emb=3, dim_model_base=16, rms_norm_eps=1e-5, attention_bias=True),
    "glm4_moe_lite": _case("glm4_moe_lite", **LATENT, **V3),
    "axk1": _case("axk1", **LATENT, **V3, n_group=4, topk_group=2, rope_parameters=DEEPSEEK_YARN),
    "longcat_flash": _case(
        "longcat_flash",
        **LATENT,
        **LONGCAT,
        num_layers=2,
        moe_topk=4,
        n_routed_experts=4,
        zero_expert_num=4,
        attention_bias=True,
        routed_scaling_factor=1.5,
        rope_parameters=DEEPSEEK_YARN,
    ),
    "deepseek_v32": _case("deepseek_v32", **LATENT, **V3, **INDEXER, n_group=4, topk_group=2),
    "glm_moe_dsa": _case("glm_moe_dsa", **LATENT, **V3, **INDEXER, index_topk_freq=2, attention_bias=True),
    "sarvam_mla": _case("sarvam_mla", **LATENT, **V3, rope_parameters=DEEPSEEK_YARN),
    "afmoe": _case("afmoe", **NEXT, num_experts=4, mup_enabled=True, attention_bias=True, **SLIDING),
}
FAIRSEQ = dict.fromkeys(("num_key_value_heads", "intermediate_size", "tie_word_embeddings"), "absent")
CASES |= {
    "opt": _case("opt", **FAIRSEQ, ffn_dim=96),
    "opt-sums": _case("opt", **FAIRSEQ, ffn_dim=96, do_layer_norm_before=False, activation_function="gelu"),
    "opt-plain": _case("opt", **FAIRSEQ, ffn_dim=96, enable_bias=False, layer_norm_elementwise_affine=False),
    "biogpt": _case("biogpt", num_key_value_heads="absent"),
    "xglm": _case(
        "xglm", **FAIRSEQ, hidden_size="absent", num_hidden_layers="absent", num_attention_heads="absent", d_model=64,
        num_layers=3, attention_heads=4, ffn_dim=96,
    ),
}  # fmt: skip
CASES |= {
    "hunyuan_v1_dense": _case("hunyuan_v1_dense", head_dim=16, attention_bias=True),
    "hunyuan_v1_dense-alpha": _case(
        "hunyuan_v1_dense",
        head_dim=16,
        rope_parameters={**ONE_THETA, "rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    ),
    "hunyuan_v1_moe": _case("hunyuan_v1_moe", head_dim=16, num_experts=4, moe_topk=2),
    "nanochat": _case("nanochat"),
    "gpt_neox_japanese": _case("gpt_neox_japanese", num_key_value_heads="absent", intermediate_size="absent"),
    "hrm_text": _case(
        "hrm_text",
        num_hidden_layers=2,
        num_key_value_heads="absent",
        head_dim=24,
        L_cycles=2,
        initializer_range=0.5,
    ),
    "dory": _case(
        "dory",
        num_hidden_layers=12,
        n_input_layers=2,
        n_output_layers=4,
        head_dim=24,
        sliding_window=16,
        layer_types=["sliding_attention", "mlp", "sliding_attention", "mlp", "full_attention", "mlp"] * 2,
        initializer_range=0.5,
        attention_bias=True,
        mlp_bias=True,
    ),
    "dory-loops": _case(
        "dory",
        num_hidden_layers=4,
        n_input_layers=0,
        n_output_layers=2,
        n_recurrent_loops=3,
        initializer_range=1.0,
        head_dim=16,
        layer_types=["full_attention", "mlp", "sliding_attention", "mlp"],
        sliding_window=16,
        tie_word_embeddings=True,
    ),
    "hrm_text-tied": _case(
        "hrm_text",
        num_hidden_layers=1,
        num_key_value_heads="absent",
        head_dim=16,
        H_cycles=3,
        L_cycles=1,
        embedding_scale=2.0,
        tie_word_embeddings=True,
    ),
    "ctrl": _gpt("ctrl", n_inner="absent", dff=96, layer_norm_epsilon=1e-3),
    "openai-gpt": _gpt("openai-gpt", n_inner="absent"),
    "apertus": replace(
        _case("apertus", attention_bias=True, rope_parameters=LLAMA3), quantizations=("q0f32", "q4f32_1")
    ),
    "apertus1p5": replace(_case("apertus1p5_text", rope_parameters=LLAMA3), architecture="apertus"),
    "codegen": _gpt("codegen", rotary_dim=8),
    "modernbert-decoder": replace(
        _case(
            "modernbert-decoder",
            **MODERN,
            local_attention=32,
            norm_bias=True,
            attention_bias=True,
            mlp_bias=True,
            classifier_bias=True,
        ),
        quantizations=("q0f32", "q4f32_1"),
    ),
    "modernbert-decoder-plain": _case("modernbert-decoder", num_key_value_heads="absent", decoder_bias=False),
    "aria_text": replace(_case("aria_text", mlp_bias=True), quantizations=("q0f32", "q4f32_1")),
    "ministral3": _case("ministral3", head_dim=16, rope_parameters={**YARN, "llama_4_scaling_beta": 0.4}),
}


SEEN = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def _wrapped(model_type: str, vision: str, text: Case, seen: Mapping[str, Any] = {}, **changes: Any) -> Case:
    """A case of a wrapper whose text model is that of `text`; `seen`: more of its vision_config."""
    images = {"model_type": vision, "image_size": 28, "patch_size": 14, **SEEN, **seen}
    config = {"model_type": model_type, "text_config": dict(text.config), "vision_config": images, **changes}
    return Case(model_type, config, quantizations=("q0f32",))


CASES |= {
    "gemma3": _wrapped(
        "gemma3",
        "siglip_vision_model",
        _case("gemma3_text", tie_word_embeddings=True, head_dim=16, **SLIDING),
        mm_tokens_per_image=4,
    ),
    "mistral3-ministral3": _wrapped("mistral3", "pixtral", CASES["ministral3"], tie_word_embeddings=False),
    "aria": _wrapped("aria", "idefics3_vision", CASES["aria_text"], projector_patch_to_query_dict={4: 4}),
    "mistral3": _wrapped("mistral3", "pixtral", _case("mistral", head_dim=16), tie_word_embeddings=False),
    "phi4_multimodal": _case(
        "phi4_multimodal",
        original_max_position_embeddings=128,
        vision_config={**SEEN, "image_size": 28, "patch_size": 14, "crop_size": 28},
        audio_config={**SEEN, "num_blocks": 1, "nemo_conv_channels": 16, "input_size": 16, "ext_pw_out_channel": 32},
    ),
}
