"""DeepSeek MoE (v1) in NumPy, from the paper (Dai et al., arXiv 2401.06066): transformers has no class for it.

The rest of the decoder is llama's (Touvron et al., arXiv 2302.13971). Nothing is shared with the code under test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
State = Mapping[str, Array]
Seen = dict[str, list[Array]]

CONFIG: dict[str, Any] = {
    "model_type": "deepseek",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 160,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
}


def has_experts(config: Mapping[str, Any], layer: int) -> bool:
    return bool(layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0)


def random_state(config: Mapping[str, Any], seed: int = 0) -> dict[str, Array]:
    """Random tensors under the names of deepseek-ai's checkpoints, float32."""
    c, rng = config, np.random.default_rng(seed)
    hidden, head = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]

    def matrix(rows: int, columns: int) -> Array:
        return np.asarray(rng.standard_normal((rows, columns)) * columns**-0.5, np.float32)

    def mlp(prefix: str, width: int) -> dict[str, Array]:
        shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        return {f"{prefix}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}

    state = {
        "model.embed_tokens.weight": matrix(c["vocab_size"], hidden),
        "lm_head.weight": matrix(c["vocab_size"], hidden),
    }
    norms = ["model.norm"]
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        norms += [f"{at}.input_layernorm", f"{at}.post_attention_layernorm"]
        for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
            state[f"{at}.self_attn.{name}_proj.weight"] = matrix(c[heads] * head, hidden)
        state[f"{at}.self_attn.o_proj.weight"] = matrix(hidden, hidden)
        if not has_experts(c, layer):
            state |= mlp(f"{at}.mlp", c["intermediate_size"])
            continue
        state[f"{at}.mlp.gate.weight"] = 3 * matrix(c["n_routed_experts"], hidden)
        for expert in range(c["n_routed_experts"]):
            state |= mlp(f"{at}.mlp.experts.{expert}", c["moe_intermediate_size"])
        if c["n_shared_experts"]:
            state |= mlp(f"{at}.mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])
    return state | {f"{name}.weight": rng.uniform(0.5, 1.5, hidden).astype(np.float32) for name in norms}


def logits(config: Mapping[str, Any], state: State, ids: list[int], seen: Seen | None = None) -> Array:
    """[len(ids), vocab_size], in float64. `seen` receives what matrices of MLPs are multiplied with, by their names."""
    seen = {} if seen is None else seen
    w = {name: values.astype(np.float64) for name, values in state.items()}
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        x = x + _attention(config, w, f"{at}.self_attn", _norm(config, x, w[f"{at}.input_layernorm.weight"]))
        normed = _norm(config, x, w[f"{at}.post_attention_layernorm.weight"])
        x = x + (_experts if has_experts(config, layer) else _mlp)(config, w, f"{at}.mlp", normed, seen)
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return np.asarray(_norm(config, x, w["model.norm.weight"]) @ w[f"{head}.weight"].T)


def _norm(config: Mapping[str, Any], x: Array, weight: Array) -> Array:
    return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight)


def _mlp(config: Mapping[str, Any], w: State, at: str, x: Array, seen: Seen) -> Array:
    gate, up = x @ w[f"{at}.gate_proj.weight"].T, x @ w[f"{at}.up_proj.weight"].T
    inner = gate / (1 + np.exp(-gate)) * up
    for name, values in (("gate_proj", x), ("down_proj", inner)):
        seen.setdefault(f"{at}.{name}.weight", []).append(np.atleast_2d(values))
    return np.asarray(inner @ w[f"{at}.down_proj.weight"].T)


def _experts(config: Mapping[str, Any], w: State, at: str, x: Array, seen: Seen) -> Array:
    """Equations 9 to 11 of the paper: shared experts, and those of the largest affinities, by their affinities."""
    scores = np.exp(x @ w[f"{at}.gate.weight"].T)
    scores /= scores.sum(-1, keepdims=True)
    out = _mlp(config, w, f"{at}.shared_experts", x, seen) if config["n_shared_experts"] else np.zeros_like(x)
    for token, row in enumerate(scores):
        chosen = np.argsort(-row)[: config["num_experts_per_tok"]]
        shares = row[chosen] / row[chosen].sum() if config["norm_topk_prob"] else row[chosen]
        for expert, share in zip(chosen, shares * config.get("routed_scaling_factor", 1.0), strict=True):
            out[token] += share * _mlp(config, w, f"{at}.experts.{expert}", x[token], seen)
    return out


def _attention(config: Mapping[str, Any], w: State, at: str, x: Array) -> Array:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = (
        (x @ w[f"{at}.{name}_proj.weight"].T).reshape(len(x), number, -1)
        for name, number in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    q, k = _turned(config, q), _turned(config, k).repeat(heads // kv_heads, axis=1)
    v = v.repeat(heads // kv_heads, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    scores[:, ~np.tri(len(x), dtype=bool)] = -np.inf
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    out = np.einsum("hqk,khd->qhd", shares, v).reshape(len(x), -1)
    return np.asarray(out @ w[f"{at}.o_proj.weight"].T)


def _turned(config: Mapping[str, Any], x: Array) -> Array:
    """Rotary positions, halves paired."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * config["rope_theta"] ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
