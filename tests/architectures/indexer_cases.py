"""Cases of models with an indexer, within the texts of which it chooses all keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.architectures.agreement import Case
from tests.architectures.family_cases import INDEXER, LATENT, ONE_THETA, V3, YARN, _wrapped
from tests.architectures.sink_cases import _case

BLOCKS = {"index_n_heads": 2, "index_head_dim": 24, "index_block_size": 16, "index_topk_blocks": 6}  # 96 tokens
M3: dict[str, Any] = {
    "head_dim": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40,
    "dense_intermediate_size": 72, "shared_intermediate_size": 48, "mlp_layer_types": ["dense", "sparse", "sparse"],
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
}  # fmt: skip
SWA = {  # of layers with a window: half as many heads, wider ones, other latents
    "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 24,
    "swa_head_dim": 36, "swa_qk_nope_head_dim": 24, "swa_v_head_dim": 16, "head_dim": 32, "sliding_window": 16,
    "layer_types": ["indexed_attention", "sliding_attention", "sliding_attention"],
    "shared_experts_intermediate_size": 48,
}  # fmt: skip
HY = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "hc_mult": 3, "hc_magnitude": 1.5}
# Few of the text's keys are chosen. With many heads, no score is zero, of which torch.topk would take any.
CHOOSING = {"index_topk": 5, "index_n_heads": 12, "index_head_dim": 24}
CASES: dict[str, Case] = {
    "deepseek_v32-choosing": _case("deepseek_v32", **LATENT, **V3, **CHOOSING, n_group=4, topk_group=2),
    "glm_moe_dsa-choosing": _case("glm_moe_dsa", **LATENT, **V3, **CHOOSING, indexer_types=["full", "shared", "full"]),
    "glm_moe_dsa-long": replace(
        _case(
            "glm_moe_dsa", **LATENT, **V3, **{**CHOOSING, "index_topk": 1030}, indexer_types=["full", "shared", "full"]
        ),
        overrides={"context_window_size": 1100},
    ),
    "axk2-choosing": _case("axk2", **LATENT, **V3, **CHOOSING, gated_norm_rank=5, rope_parameters=YARN),
    "dots3_note_text-choosing": _case("dots3_note_text", **LATENT, **V3, **CHOOSING, **SWA, n_group=4, topk_group=2),
    "hy_v4-choosing": _case("hy_v4", **LATENT, **HY, **CHOOSING, indexer_types=["full", "shared", "shared"]),
    "axk2": _case("axk2", **LATENT, **V3, **INDEXER, gated_norm_rank=5, attention_bias=True, rope_parameters=YARN),
    "axk2-groups": replace(
        _case("axk2", **LATENT, **V3, **INDEXER, n_group=4, topk_group=2, moe_layer_freq=2), quantizations=("q0f32",)
    ),
    "dots3_note_text": _case(
        "dots3_note_text", **LATENT, **V3, **INDEXER, **SWA, attention_bias=True, n_group=4, topk_group=2
    ),
    "hy_v4": _case("hy_v4", **LATENT, **HY, **INDEXER, attention_bias=True, swiglu_limit=0.5),
    "minimax_m3_vl_text": _case("minimax_m3_vl_text", **M3, **BLOCKS, partial_rotary_factor=0.5, swiglu_limit=0.5),
}
HY_TEXT = {**CASES["hy_v4"].config, "model_type": "hy_v4_vl_text"}
HY_TEXT["rope_parameters"] = {**ONE_THETA, "mrope_section": [2, 1, 1]}
CASES |= {
    name: _wrapped(
        "hy_v4_vl",
        "hy_v4_vl_vision",
        Case("hy_v4_vl", {**HY_TEXT, **more}),
        {"out_hidden_size": 64},
        tie_word_embeddings=False,
    )
    for name, more in (("hy_v4_vl", {}), ("hy_v4_vl-choosing", {**CHOOSING, "indexer_types": ["full"] * 3}))
}
