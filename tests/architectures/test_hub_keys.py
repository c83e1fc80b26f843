"""Keys of checkpoints on the hub beside those that transformers writes today: each is known, none is passed over."""

from __future__ import annotations

from typing import Any

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.architecture import resolve
from mlcbuild.models.parameters import ignored, parameters
from tests.architectures.agreement import config_of, known_architectures
from tests.architectures.test_agreement import CASES

MOE = {"ep_size": 1, "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True}
HUB: dict[str, dict[str, Any]] = {
    "axk1": {
        **MOE,
        "scoring_func": "sigmoid",
        "topk_method": "none",
        "first_k_dense_replace": 1,
        "mlp_layer_types": None,
    },
    "cohere2": {
        **{"layer_switch": 4, "order_of_interleaved_layers": "local_attn_first", "use_qk_norm": False},
        **{"position_embedding_type": "rope_gptj", "rotary_pct": 1.0, "use_embedding_sharing": True},
        **{"use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": False},
    },
    "deepseek_v2": {**MOE, "scoring_func": "softmax", "norm_topk_prob": False},
    "deepseek_v3": {**MOE, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1},
    "dots1": {"scoring_func": "noaux_tc", "n_group": None, "topk_group": None, "moe_layer_freq": 1},
    "ernie4_5_moe": {
        **{"moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_use_aux_free": True, "moe_gate_act": None},
        **{"num_nextn_predict_layers": 1, "use_rmsnorm": True},
    },
    "ctrl": {"n_ctx": 512, "from_tf": False, "output_past": True, "num_labels": 1, "pruned_heads": {}},
    "exaone": {"embed_dropout": 0.0},
    "falcon_h1": {
        "mamba_use_mlp": True,
        "mlp_expansion_factor": 8,
        "attn_layer_indices": None,
        "time_step_floor": 1e-4,
    },
    "granitemoehybrid": {"init_method": "mup", "normalization_function": "rmsnorm", "position_embedding_type": "nope"},
    "jamba": {"mamba_inner_layernorms": True, "calc_logits_for_entire_prompt": False, "sliding_window": None},
    "kimi_linear": {
        **{
            "moe_router_activation_func": "sigmoid",
            "mla_use_nope": True,
            "use_grouped_topk": True,
            "moe_layer_freq": 1,
        },
        "linear_attn_config": {"full_attn_layers": [2, 4], "kda_layers": [1, 3], "head_dim": 24, "num_heads": 3},
    },
    "lfm2": {"block_dim": 64, "block_use_swiglu": True, "conv_dim": 64, "num_heads": 4, "use_pos_enc": True},
    "qwen3_5_text": {"attn_output_gate": True, "full_attention_interval": 4, "mtp_num_hidden_layers": 1},
    "hy_v3": {
        **{"expert_hidden_dim": 40, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "qk_norm": True},
        **{"route_norm": True, "moe_router_use_sigmoid": True, "moe_router_enable_expert_bias": True},
        **{"enable_lm_head_fp32": True, "use_grouped_mm": False},
    },
    "hy_v4": {
        **{
            "enable_ihc": True,
            "gated_mla": True,
            "gating_type": "elementwise",
            "learnable_sink": True,
            "use_mla": True,
        },
        **{"use_dsa": True, "num_nextn_predict_layers": 1, "mtp_loss_factor": 0.1, "enable_lm_head_fp32": True},
        "layer_types": ["deepseek_sparse_attention"] * 3,
    },
    "dots3_note_text": {
        **{"per_layer_config": None, "swa_num_attention_heads": 2, "swa_qk_rope_head_dim": 12, "swa_rope_theta": 5e4},
        **{"attention_gate_type": "headwise", "apply_mla_qkv_lora_rescale": True, "sliding_window_size": 513},
        "moe_layer_freq": [0, 1, 1],
    },
    "minimax_m3_vl_text": {
        **{"layer_types": None, "mlp_layer_types": None, "moe_layer_freq": [0, 1, 1], "hidden_act": "swigluoai"},
        **{"use_gemma_norm": True, "use_qk_norm": True, "qk_norm_type": "per_head", "scoring_func": "sigmoid"},
        **{"n_shared_experts": 1, "num_mtp_modules": 1, "use_routing_bias": True, "num_nextn_predict_layers": 1},
        "sparse_attention_config": {
            **{"use_sparse_attention": True, "sparse_attention_freq": [0, 1, 1], "sparse_index_dim": 24},
            **{"sparse_topk_blocks": 2, "sparse_block_size": 16},
        },
    },
    "longcat_flash": {
        **{"attention_method": "MLA", "zero_expert_type": "identity", "norm_topk_prob": False, "router_bias": False},
        **{"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    },
    "minimax_m2": {
        **{"attn_type_list": [1, 1, 1], "scoring_func": "sigmoid", "use_qk_norm": True, "qk_norm_type": "per_layer"},
        **{"use_routing_bias": True, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "rotary_dim": 8},
        **{"num_mtp_modules": 3, "mtp_transformer_layers": 1, "use_mtp": True, "mlp_intermediate_size": 8192},
        **dict.fromkeys((f"layernorm_{of}_beta" for of in ("full_attention", "linear_attention", "mlp")), 1.0),
        "attention_bias": False,
    },
    "sarvam_mla": {
        **{"head_dim": 40, "q_head_dim": 32, "num_experts": 8, "num_shared_experts": 1, "rope_parameters": None},
        "rope_scaling": {"type": "deepseek_yarn", "factor": 40, "original_max_position_embeddings": 4096},
    },
    "sarvam_moe": {
        **{
            "score_function": "sigmoid",
            "use_bias": False,
            "use_qkv_bias": False,
            "moe_router_enable_expert_bias": True,
        },
        **{"output_dropout": 0.0, "embedding_dropout": 0.0, "max_window_layers": 3},
    },
    "xlstm": {
        **{"hidden_size": None, "num_hidden_layers": None, "head_dim": 24, "cell_norm_eps": 1e-6, "add_qk_norm": False},
        **{"add_post_blocks_norm": True, "add_post_norm": False, "mlstm_round_up_to_multiple_of": 64},
        **{"add_embedding_dropout": False, "chunkwise_kernel": "chunkwise--triton_xl_chunk", "step_kernel": "triton"},
        **{"add_forward_backend_padding": False, "force_bos_token_insert": True, "igate_bias_init_range": -10.0},
    },
}


@pytest.mark.parametrize("name", HUB)
def test_keys_of_the_hub_are_known(name: str) -> None:
    resolve(known_architectures()[name], config_of(CASES[name]) | HUB[name], {})


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("cohere2", "order_of_interleaved_layers", "global_attn_first"),
        ("deepseek_v2", "norm_topk_prob", True),
        ("deepseek_v2", "topk_method", "noaux_tc"),
        ("deepseek_v3", "moe_layer_freq", 2),
        ("diffllama", "num_key_value_heads", 1),
        ("longcat_flash", "mla_scale_q_lora", False),
        ("xlstm", "weight_mode", "fused"),
        ("xlstm", "add_post_norm", True),
        ("zamba", "tie_word_embeddings", False),
        ("zamba2", "use_long_context", True),
        ("zamba2", "tie_word_embeddings", False),
        ("hy_v3", "route_norm", False),
        ("minimax_m2", "layernorm_mlp_beta", 0.5),
        ("sarvam_moe", "score_function", "softmax"),
        ("hy_v4", "enable_ihc", False),
        ("dots3_note_text", "attention_gate_type", "elementwise"),
        ("minimax_m3_vl_text", "qk_norm_type", "per_layer"),
    ],
)
def test_what_would_compute_something_else_is_refused(name: str, key: str, value: Any) -> None:
    with pytest.raises(MlcBuildError, match=key):
        resolve(known_architectures()[name], config_of(CASES[name]) | {key: value}, {})


def test_layers_that_guess_further_tokens_are_left_out() -> None:
    structure = resolve(known_architectures()["deepseek_v3"], config_of(CASES["deepseek_v3"]), {})
    assert "model.layers.3.*" in ignored(structure)


def test_plain_layers_of_hy_v3() -> None:
    """Before transformers had `mlp_layer_types`, `first_k_dense_replace` said it."""
    config = config_of(CASES["hy_v3"]) | {"mlp_layer_types": None, "first_k_dense_replace": 2}
    names = [each.name for each in parameters(resolve(known_architectures()["hy_v3"], config, {}))]
    assert [f"model.layers.{i}.mlp.gate.weight" in names for i in range(3)] == [False, False, True]


def test_where_a_model_chooses_blocks_of_keys() -> None:
    """MiniMax M3 as the hub has it: two blocks of 16 keys; without layers that choose, all that it was trained for."""
    config = config_of(CASES["minimax_m3_vl_text"]) | HUB["minimax_m3_vl_text"]
    file = known_architectures()["minimax_m3_vl_text"]
    assert resolve(file, config, {}).context_window_size == 32
    config["sparse_attention_config"] = {"sparse_attention_freq": [0, 0, 0]}
    assert resolve(file, config, {}).context_window_size == config["max_position_embeddings"]


def test_released_checkpoints_of_dots3_say_the_same_as_transformers_does() -> None:
    """`swa_` keys, or what is another one in each layer with a window."""
    case, file = CASES["dots3_note_text"], known_architectures()["dots3_note_text"]
    whole = config_of(case)
    released = {key: value for key, value in whole.items() if key != "per_layer_config"} | dict(case.config)
    released["layer_types"] = ["full_attention", *released["layer_types"][1:]]
    assert resolve(file, released, {}) == resolve(file, whole, {})
