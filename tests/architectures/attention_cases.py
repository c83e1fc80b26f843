"""Cases whose difficulty is attention: windows, caps, widths of heads, rotary embeddings of every kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.architectures.agreement import Case
from tests.architectures.cases import like_llama

GEMMA: dict[str, Any] = {"tie_word_embeddings": True, "query_pre_attn_scalar": 24, "sliding_window": 16}


def case(model_type: str, window: int | None = None, **changes: Any) -> Case:
    """`window` is the longest text that the library is made for."""
    overrides = {} if window is None else {"context_window_size": window}
    return replace(like_llama(model_type, **changes), quantizations=("q0f32",), overrides=overrides)


def rope(kind: str, window: int | None = None, longest: int = 128, **settings: Any) -> Case:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **settings}
    return case("llama", window, rope_parameters=parameters, max_position_embeddings=longest)


def longrope(original: int, window: int | None = None) -> Case:
    settings = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.1, 3.8],
        "long_factor": [1.0, 2.0, 4.0, 6.0, 9.0, 12.0, 16.0, 20.0],
    }
    return case("phi3", window, rope_parameters=settings, original_max_position_embeddings=original)


# Prompts have 40 tokens: more than two windows of 16, and longer than what some were trained for.
CASES: dict[str, Case] = {
    "mistral-16": case("mistral", sliding_window=16),
    "mistral-80-wide": case("mistral", sliding_window=None, head_dim=80),
    "gemma2-256-wide": case("gemma2", **GEMMA, attn_logit_softcapping=2.0, head_dim=256),
    "gemma3_text-one-key-head": case("gemma3_text", **GEMMA, head_dim=32, num_hidden_layers=6, num_key_value_heads=1),
    "qwen3-96-wide": case("qwen3", head_dim=96),
    "qwen2-window": case("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=2),
    "qwen3-window": case("qwen3", head_dim=16, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "phi3-window": case("phi3", sliding_window=16),
    "phi3-short": longrope(original=64, window=64),
    "phi3-long": longrope(original=32),
    "phi3-partial": case("phi3", partial_rotary_factor=0.75, tie_word_embeddings=True),
    "llama-linear": rope("linear", factor=4.0),
    "llama-dynamic": rope("dynamic", factor=3.0),
    "llama-dynamic-longer": rope("dynamic", window=40, longest=32, factor=3.0),
    "llama-llama3": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "llama-yarn": rope("yarn", factor=4.0, original_max_position_embeddings=32),
}

# What each choice changes: a case, and the fields of its structure without it; `roles` are parameters left out.
WITHOUT: dict[str, tuple[str, dict[str, Any]]] = {
    "a window": ("mistral-16", {"sliding_window_size": None}),
    "layers that do not slide": ("gemma2-256-wide", {"layer_types": None}),
    "which layers slide": ("gemma3_text-one-key-head", {"layer_types": ("full", *["sliding"] * 5)}),
    "the soft cap of scores": ("gemma2-256-wide", {"attn_logit_softcapping": None}),
    "the scale of scores": ("gemma2-256-wide", {"attention_scale": None}),
    "the theta of sliding layers": ("gemma3_text-one-key-head", {"rope_local_theta": None}),
    "partial rotary": ("phi", {"rotary_dim": None}),
    "neighbours": ("gptj", {"rope_pairing": "halves"}),
    "rotary embedding": ("stablelm", {"rope": "none"}),
    "linear biases": ("bloom-12-heads", {"alibi_bias_max": None}),
    "how far linear biases reach": ("bloom-12-heads", {"alibi_bias_max": 4.0}),
    "clipping": ("olmo-clip", {"clip_qkv": None}),
    "norms of heads": ("qwen3-96-wide", {"qk_norm": "none", "roles": ("q_norm", "k_norm")}),
    "norms of each head": ("cohere-norms", {"qk_norm": "none", "roles": ("q_norm", "k_norm")}),
    "norms of all heads": ("olmo2", {"qk_norm": "none", "roles": ("q_norm", "k_norm")}),
    "norms of each head, a tensor each": ("stablelm-norms", {"qk_norm": "none", "roles": ("q_norm", "k_norm")}),
    "biases of norms of heads": ("phi-norms", {"roles": ("q_norm_bias", "k_norm_bias")}),
    "longrope": ("phi3-long", {"rope_scaling": None}),
    "short factors": ("phi3-short", {"context_window_size": 96}),
    "linear": ("llama-linear", {"rope_scaling": None}),
    "dynamic": ("llama-dynamic-longer", {"rope_scaling": None}),
    "llama3": ("llama-llama3", {"rope_scaling": None}),
    "yarn": ("llama-yarn", {"rope_scaling": None}),
}
