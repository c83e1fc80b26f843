"""A small model of each architecture, and of its choices. What transformers lacks is in references.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from tests.architectures import deepseek
from tests.architectures import references as ref
from tests.architectures import rwkv_reference as rwkv
from tests.architectures.agreement import Case, Config

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 96,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


BLOOM: dict[str, Any] = {
    "model_type": "bloom", "vocab_size": 96, "hidden_size": 64, "n_layer": 3, "n_head": 4, "seq_length": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MPT: dict[str, Any] = {
    "model_type": "mpt", "vocab_size": 96, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 128,
    "attn_config": {"clip_qkv": 0.7, "softmax_scale": 0.3, "alibi": True}, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def like_llama(model_type: str, **changes: Any) -> Case:
    """A case whose config.json has llama's keys."""
    return Case(model_type, _config(model_type, changes))


def from_paper(
    model_type: str,
    shapes: Callable[[Config], Mapping[str, tuple[int, ...]]],
    reference: Callable[[Config, Mapping[str, Any], list[int]], Any],
    **changes: Any,
) -> Case:
    """A case with llama's keys whose model is written in tests/architectures/references.py."""
    return Case(model_type, _config(model_type, {"rms_norm_eps": 1e-5, **changes}), shapes, reference)


def _config(model_type: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    config = {"model_type": model_type, **SIZES, **changes}
    return {key: value for key, value in config.items() if value != "absent"}


MINICPM = {"scale_emb": 3, "scale_depth": 1.4, "dim_model_base": 16}
QWEN: dict[str, Any] = {
    "model_type": "qwen",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 5000,
    "rotary_pct": 1.0,
    "seq_length": 128,
    "no_bias": True,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
}

CHATGLM: dict[str, Any] = {
    "model_type": "chatglm",
    "padded_vocab_size": 96,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "seq_length": 128,
    "rope_ratio": 2,
}
RWKV: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "rescale_every": 2,  # so that the last layer's matrices are halved
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
RWKV5 = {"model_type": "rwkv5", "model_version": "5_2", "head_size": rwkv.HEAD, "head_size_divisor": 8, **RWKV}
RWKV6 = {"model_type": "rwkv6", "head_size": rwkv.HEAD, **RWKV}
MAMBA: dict[str, Any] = {  # 69 and 92 channels fill no whole vectors, 69 no whole task
    "vocab_size": 96, "hidden_size": 46, "intermediate_size": 69, "state_size": 5, "num_hidden_layers": 3,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MAMBA2 = {"model_type": "mamba2", **MAMBA, "intermediate_size": 92, "num_heads": 4, "head_dim": 23, "n_groups": 2}
XLSTM: dict[str, Any] = {  # keys of 12 numbers, values of 24, which its cache does not take
    "model_type": "xlstm", "vocab_size": 96, "hidden_size": 72, "num_hidden_layers": 3, "num_heads": 3,
    "ffn_round_up_to_multiple_of": 32, "use_cache": False, "gate_soft_cap": 5.0, "output_logit_soft_cap": 3.0,
}  # fmt: skip
NO_WINDOW = {"context_window_size": -1}
CASES: dict[str, Case] = {
    "rwkv": Case("rwkv", {"model_type": "rwkv", "context_length": 64, **RWKV}, overrides=NO_WINDOW),
    "rwkv5": Case("rwkv5", RWKV5, rwkv.shapes_5, rwkv.logits_5, NO_WINDOW),
    "rwkv6": Case("rwkv6", RWKV6, rwkv.shapes_6, rwkv.logits_6, NO_WINDOW),
    "mamba": Case("mamba", {"model_type": "mamba", **MAMBA}, overrides=NO_WINDOW),
    "mamba-biases": Case(
        "mamba",
        {
            "model_type": "mamba",
            **MAMBA,
            "use_bias": True,
            "use_conv_bias": False,
            "conv_kernel": 3,
            "time_step_rank": 7,
            "tie_word_embeddings": False,
        },
        overrides=NO_WINDOW,
        quantizations=("q0f32",),
    ),
    # The norm of steps of rank 3 would multiply what rounding leaves.
    "falcon_mamba": Case(
        "falcon_mamba",
        {"model_type": "falcon_mamba", **MAMBA, "state_size": 9, "time_step_rank": 8},
        overrides=NO_WINDOW,
    ),
    "mamba2": Case("mamba2", MAMBA2, overrides=NO_WINDOW),
    "mamba2-limits": Case(
        "mamba2",
        {**MAMBA2, "time_step_limit": [0.6, 0.9], "use_bias": True, "use_conv_bias": False, "n_groups": 4},
        overrides=NO_WINDOW,
        quantizations=("q0f32",),
    ),
    # Heads are normed, and one is small where its query and what was written point elsewhere.
    "xlstm": Case("xlstm", XLSTM, overrides=NO_WINDOW, noise=2),
    "llama": like_llama("llama"),
    "qwen2": like_llama("qwen2"),
    "qwen2-tied": like_llama("qwen2", tie_word_embeddings=True),
    "gemma": like_llama("gemma", tie_word_embeddings=True, head_dim=32),
    "olmo": like_llama("olmo"),
    "internlm": from_paper("internlm", ref.internlm_shapes, ref.llama_like, bias=True, num_key_value_heads="absent"),
    "internlm2": from_paper("internlm2", ref.internlm2_shapes, ref.internlm2, bias=False, rope_theta=5000),
    "minicpm": from_paper("minicpm", ref.llama_shapes, ref.minicpm, **MINICPM),
    "minicpm-tied": from_paper("minicpm", ref.llama_shapes, ref.minicpm, **MINICPM, tie_word_embeddings=True),
    "orion": from_paper("orion", ref.orion_shapes, ref.orion),
    "baichuan": from_paper("baichuan", ref.baichuan_shapes, ref.baichuan, num_key_value_heads="absent"),
    "baichuan2": replace(  # quantized rows are no longer of length 1, and need not be
        from_paper("baichuan", ref.baichuan_shapes, ref.baichuan, num_key_value_heads="absent", vocab_size=125696),
        quantizations=("q0f32",),
    ),
    "baichuan-13b": from_paper(
        "baichuan",
        ref.baichuan_shapes,
        ref.baichuan,
        num_key_value_heads="absent",
        max_position_embeddings="absent",
        model_max_length=128,
        num_attention_heads=4,
    ),
    "bloom": Case("bloom", BLOOM),
    "bloom-12-heads": Case("bloom", {**BLOOM, "n_head": 12, "hidden_size": 96}),
    "mpt": Case("mpt", MPT),
    "qwen": Case("qwen", QWEN, ref.qwen_shapes, ref.qwen),
    "mixtral": like_llama("mixtral", num_local_experts=4),
    "qwen2_moe": like_llama(
        "qwen2_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=48,
        mlp_only_layers=[1],
    ),
    "qwen3_moe": like_llama("qwen3_moe", head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40),
    "deepseek": Case(
        "deepseek",
        deepseek.CONFIG,
        lambda config: {name: values.shape for name, values in deepseek.random_state(config).items()},
        lambda config, tensors, ids: torch.tensor(
            deepseek.logits(config, {k: v.numpy() for k, v in tensors.items()}, ids)
        ),
    ),
    "gpt2": Case("gpt2", {"model_type": "gpt2", **GPT2_SIZES}),
    "gpt2-untied": Case("gpt2", {"model_type": "gpt2", **GPT2_SIZES, "tie_word_embeddings": False}),
    "gpt_bigcode": Case("gpt_bigcode", {"model_type": "gpt_bigcode", **GPT2_SIZES}),
    "gpt_bigcode-multi-head": Case("gpt_bigcode", {"model_type": "gpt_bigcode", **GPT2_SIZES, "multi_query": False}),
    "gptj": Case("gptj", {"model_type": "gptj", **GPT2_SIZES, "rotary_dim": 8, "tie_word_embeddings": False}),
    "gpt_neox": like_llama("gpt_neox", num_key_value_heads="absent", rotary_pct=0.5),
    "gpt_neox-sequential": like_llama("gpt_neox", num_key_value_heads="absent", use_parallel_residual=False),
    "phi": like_llama("phi"),
    "phi-norms": like_llama("phi", qk_layernorm=True),
    "phi3": like_llama("phi3"),
    "phi3-longrope": like_llama(
        "phi3",
        original_max_position_embeddings=32,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [1.5 + 0.2 * i for i in range(8)],
        },
    ),
    "mistral": like_llama("mistral", sliding_window=10),
    "qwen3": like_llama("qwen3", head_dim=32),
    "qwen3-biases": like_llama("qwen3", head_dim=32, attention_bias=True),
    "gemma2": like_llama(
        "gemma2",
        tie_word_embeddings=True,
        head_dim=32,
        sliding_window=9,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3_text": like_llama(
        "gemma3_text",
        tie_word_embeddings=True,
        head_dim=32,
        sliding_window=9,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_hidden_layers=4,
    ),
    "stablelm": like_llama("stablelm", use_qkv_bias=True),
    "stablelm-parallel": like_llama("stablelm", use_parallel_residual=True),
    "stablelm-norms": like_llama("stablelm", qk_layernorm=True),
    "starcoder2": like_llama("starcoder2", sliding_window=10),
    "starcoder2-tied": like_llama("starcoder2", tie_word_embeddings=True, use_bias=False),
    "cohere": like_llama("cohere", tie_word_embeddings=True, logit_scale=0.25),
    "cohere-norms": like_llama("cohere", tie_word_embeddings=True, use_qk_norm=True),
    "olmo-clip": like_llama("olmo", clip_qkv=0.7),
    "olmo2": like_llama("olmo2"),
    "nemotron": like_llama("nemotron", mlp_bias=True, head_dim=32, partial_rotary_factor=0.25),
    "chatglm": Case("chatglm", CHATGLM, ref.chatglm_shapes, ref.chatglm),
}
