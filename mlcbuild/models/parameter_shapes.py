"""The shapes of parameters, by the roles that they play in a layer or outside the layers."""

from __future__ import annotations

import math
from collections.abc import Callable

from mlcbuild.models import mixers
from mlcbuild.models.kinds import HYBRID, RECURRENT, recurrent_shapes
from mlcbuild.models.ngrams import ngrams_of
from mlcbuild.models.structure import Structure

_PARTS = ("attention", "mlp", "final")  # what may be given a mixture of several hidden states (hybrid.residuals)
_MATRICES = (
    "lm_head",
    "head_dense",
    "router",
    "attention_gate",
    "router_in",
    "router_1",
    "router_2",
    "qk_convolution",
    "qk_mixing",
)


def shape_of(role: str, structure: Structure) -> tuple[int, ...]:
    """The shape of the parameter that plays `role` in one layer, or outside the layers.

    A bias `x_bias` and factors `x_scale` have the rows of `x_proj`, the bias of a norm has the norm's shape. Raises
    KeyError for a role that there is not.
    """
    if structure.kind in RECURRENT:
        return recurrent_shapes(structure)[role]
    if structure.kind == HYBRID and structure.mixer and role in (mine := mixers.shapes(structure)):
        return mine[role]
    if role.endswith(("_bias", "_scale")) and role not in _SHAPES:
        of = role.rpartition("_")[0]
        if of.endswith("_norm"):
            return shape_of(of, structure)
        return shape_of(of if of in _MATRICES else f"{of}_proj", structure)[:1]
    return _SHAPES[role](structure)


def query_rows(s: Structure) -> int:
    """Numbers of all heads' queries."""
    return s.num_attention_heads * (s.qk_head_dim or s.head_dim)


def _key(s: Structure) -> int:
    return s.num_key_value_heads * (s.qk_head_dim or s.head_dim)


def _value(s: Structure) -> int:
    return s.num_key_value_heads * _value_width(s)


def _value_width(s: Structure) -> int:
    """Of a value as matrices have it: two of them are the value of a head with differential attention."""
    return (s.value_head_dim or s.head_dim) // (1 + s.differential)


def _width(s: Structure) -> tuple[int, ...]:
    return (s.hidden_size,)


def _attended(s: Structure) -> int:
    """The width of what attention is given."""
    return s.hidden_size * (1 + s.attention_into_mixer)


def _table(s: Structure) -> int:
    """The width of tables that are looked up in."""
    return s.embedding_size or s.hidden_size


def _expert_width(s: Structure) -> int:
    """Of what routed experts are given and return."""
    return s.moe_latent_size or s.hidden_size


def _head_norm(s: Structure, heads: int) -> tuple[int, ...]:
    dim = s.qk_head_dim or s.head_dim
    return {"head": (dim,), "per_head": (heads, dim), "all": (heads * dim,)}[s.qk_norm]


_SHAPES: dict[str, Callable[[Structure], tuple[int, ...]]] = {
    "embedding": lambda s: (s.vocab_size, _table(s)),
    "position_embedding": lambda s: (s.max_position_embeddings or s.context_window_size, _table(s)),
    "token_type_embedding": lambda s: (s.type_vocab_size, _table(s)),
    "embedding_norm": lambda s: (_table(s),),
    "embedding_proj": lambda s: (s.hidden_size, _table(s)),
    "qkv_proj": lambda s: ((1 + s.query_gate) * query_rows(s) + _key(s) + _value(s), _attended(s)),
    "q_proj": lambda s: ((1 + s.query_gate) * query_rows(s), _attended(s)),
    "k_proj": lambda s: (_key(s), _attended(s)),
    "v_proj": lambda s: (_value(s) // (2 if s.convolutions else 1), _attended(s)),
    "v_before_proj": lambda s: (_value(s) // 2, s.hidden_size),
    "qk_convolution": lambda s: (query_rows(s) + _key(s), 1, s.convolutions[0]),
    "qk_mixing": lambda s: (query_rows(s) + _key(s), s.head_dim, s.convolutions[1]),
    "key_scale": lambda s: (s.num_key_value_heads,),
    **{f"{name}_adapter_a_proj": lambda s: (s.adapter_rank, _attended(s)) for name in ("q", "k", "v")},
    "q_adapter_b_proj": lambda s: (query_rows(s), s.adapter_rank),
    "k_adapter_b_proj": lambda s: (_key(s), s.adapter_rank),
    "v_adapter_b_proj": lambda s: (_value(s), s.adapter_rank),
    "gate_up_adapter_a_proj": lambda s: (s.adapter_rank, s.hidden_size),
    "gate_up_adapter_b_proj": lambda s: (2 * s.intermediate_size, s.adapter_rank),
    "into_mixer_proj": lambda s: (s.hidden_size, s.hidden_size),
    "mixer_norm": _width,
    "kv_proj": lambda s: (_key(s) + _value(s), s.hidden_size),
    "attention_router": lambda s: (s.num_experts, s.hidden_size),
    "attention_experts_q_proj": lambda s: (s.num_experts, _key(s), s.hidden_size),
    "attention_experts_o_proj": lambda s: (s.num_experts, s.hidden_size, _value(s)),
    "attention_experts_bias": _width,
    "experts_sum_bias": _width,
    "key_step_proj": lambda s: (s.num_key_value_heads, _value(s)),
    "key_rate": lambda s: (s.num_key_value_heads,),
    **{f"{part}_{of}{end}": _width for part in _PARTS for of in ("residual", "returned") for end in ("", "_shift")},
    **dict.fromkeys(("attention_rate", "mlp_rate", "embedding_factor", "embedding_factor_shift"), _width),
    "query_scale": lambda s: (query_rows(s),),
    "sinks": lambda s: (s.num_attention_heads,),
    "o_proj": lambda s: (s.hidden_size, s.num_attention_heads * _value_width(s)),
    "difference": lambda s: (2,),
    "o_norm": lambda s: (s.num_attention_heads * (s.value_head_dim or s.head_dim),),
    "q_a_proj": lambda s: (s.q_lora_rank, s.hidden_size),
    "q_a_norm": lambda s: (s.q_lora_rank,),
    "q_b_proj": lambda s: (
        query_rows(s) + (s.num_attention_heads * s.value_head_dim if s.query_gate else 0),
        s.q_lora_rank * (1 + s.raw_query_latent),
    ),
    "kv_a_proj": lambda s: (s.kv_lora_rank + (s.rotary_dim or 0), s.hidden_size),
    "kv_a_norm": lambda s: (s.kv_lora_rank,),
    "k_turned_norm": lambda s: (s.rotary_dim or 0,),
    "index_query": lambda s: (s.indexer[1] * s.indexer[2], s.q_lora_rank),
    "index_key": lambda s: (s.indexer[2], s.hidden_size),
    "index_norm": lambda s: (s.indexer[2],),
    "index_weights": lambda s: (s.indexer[1], s.hidden_size),
    "kv_b_proj": lambda s: (
        s.num_attention_heads * (s.qk_head_dim - (s.rotary_dim or 0) + s.value_head_dim),
        s.kv_lora_rank,
    ),
    "latent_keys_proj": lambda s: (s.num_attention_heads, s.kv_lora_rank, s.qk_head_dim - (s.rotary_dim or 0)),
    "latent_values_proj": lambda s: (s.num_attention_heads, s.value_head_dim, s.kv_lora_rank),
    "gate_up_proj": lambda s: (2 * s.intermediate_size, s.hidden_size),
    "gate_proj": lambda s: (s.intermediate_size, s.hidden_size),
    "up_proj": lambda s: (s.intermediate_size, s.hidden_size),
    "down_proj": lambda s: (s.hidden_size, s.intermediate_size),
    "down_norm": lambda s: (s.intermediate_size,),
    "attention_gate": lambda s: (s.num_attention_heads * (s.value_head_dim or s.head_dim), s.hidden_size),
    "attention_gate_bias": lambda s: (s.num_attention_heads,),
    "attention_head_gate": lambda s: (s.num_attention_heads, s.hidden_size),
    "router": lambda s: (s.num_experts + s.zero_experts, s.router_width or s.hidden_size),
    "key_router": lambda s: (2 * math.isqrt(s.key_experts), s.hidden_size),
    **dict.fromkeys(("experts_in_rows", "experts_out_rows"), lambda s: (s.key_experts, s.hidden_size)),
    "router_in": lambda s: (s.router_width, s.hidden_size),
    **dict.fromkeys(("router_1", "router_2"), lambda s: (s.router_width, s.router_width)),
    **dict.fromkeys(("router_carry", "router_inner_norm"), lambda s: (s.router_width,)),
    "router_norm": _width,
    "dense_post_norm": _width,
    "experts_norm": _width,
    "experts_post_norm": _width,
    "expert_scale": lambda s: (s.num_experts,),
    "layer_scale": lambda s: (1,),
    "per_layer_embedding": lambda s: (s.per_layer_rows, s.num_hidden_layers * s.per_layer_size),
    "per_layer_proj": lambda s: (s.num_hidden_layers * s.per_layer_size, s.hidden_size),
    "per_layer_norm": lambda s: (s.per_layer_size,),
    "per_layer_gate_proj": lambda s: (s.per_layer_size, s.hidden_size),
    "per_layer_out_proj": lambda s: (s.hidden_size, s.per_layer_size),
    "per_layer_post_norm": _width,
    "streams_proj": lambda s: ((s.streams - 1) * s.hidden_size, s.hidden_size),
    **{f"streams_out_{number}_proj": lambda s: (s.hidden_size, s.hidden_size) for number in range(1, 4)},
    "streams_router": lambda s: (s.streams, s.hidden_size),
    "streams_predict": lambda s: (s.streams**2, s.streams),
    "streams_correct": lambda s: (s.streams, s.streams),
    "streams_norm": _width,
    "streams_scale": _width,
    **{f"{part}_mix": lambda s: (2 * s.streams, s.streams * s.hidden_size) for part in ("attention", "mlp")},
    **{f"{part}_mix_bias": lambda s: (2 * s.streams,) for part in ("attention", "mlp")},
    **{f"{part}_mix_scale": lambda s: (2,) for part in ("attention", "mlp")},
    "head_mix": lambda s: (s.streams, s.streams * s.hidden_size),
    "head_mix_bias": lambda s: (s.streams,),
    "head_mix_scale": lambda s: (1,),
    **{f"{part}_mixture_norm": lambda s: (s.streams * s.hidden_size,) for part in _PARTS},
    **{f"{part}_mixture_in_proj": lambda s: (s.mixture_rank, s.streams * s.hidden_size) for part in _PARTS},
    **{f"{part}_mixture_out_proj": lambda s: (s.streams * s.hidden_size, s.mixture_rank) for part in _PARTS},
    **{f"{part}_injection": lambda s: (s.streams, s.streams * s.hidden_size) for part in _PARTS},
    "ngram_embedding": lambda s: (ngrams_of(s).rows(s.ngram_table), ngrams_of(s).width // ngrams_of(s).parts),
    "ngram_key_proj": lambda s: (s.streams * s.hidden_size, ngrams_of(s).width),
    "ngram_value_proj": lambda s: (s.hidden_size, ngrams_of(s).width),
    "ngram_convolution": lambda s: (s.streams * s.hidden_size, 1, ngrams_of(s).kernel),
    **{f"ngram_{name}_norm": lambda s: (s.streams * s.hidden_size,) for name in ("key", "query", "value")},
    "laurel_in_proj": lambda s: (s.laurel_rank, s.hidden_size),
    "laurel_out_proj": lambda s: (s.hidden_size, s.laurel_rank),
    "laurel_norm": _width,
    "router_correction": lambda s: (s.num_experts + s.zero_experts,),
    "experts_gate_up_proj": lambda s: (s.num_experts, 2 * s.moe_intermediate_size, _expert_width(s)),
    "experts_up_proj": lambda s: (s.num_experts, s.moe_intermediate_size, _expert_width(s)),
    "experts_down_proj": lambda s: (s.num_experts, _expert_width(s), s.moe_intermediate_size),
    "experts_in_proj": lambda s: (_expert_width(s), s.hidden_size),
    "experts_out_proj": lambda s: (s.hidden_size, _expert_width(s)),
    "experts_gate_up_bias": lambda s: (s.num_experts, 2 * s.moe_intermediate_size),
    "experts_down_bias": lambda s: (s.num_experts, s.hidden_size),
    "shared_gate_up_proj": lambda s: (2 * s.shared_expert_intermediate_size, s.hidden_size),
    "shared_up_proj": lambda s: (s.shared_expert_intermediate_size, s.hidden_size),
    "shared_down_proj": lambda s: (s.hidden_size, s.shared_expert_intermediate_size),
    "shared_gate": lambda s: (1, s.hidden_size),
    "relative_bias": lambda s: (32, s.num_attention_heads),
    "q_norm": lambda s: _head_norm(s, s.num_attention_heads),
    "k_norm": lambda s: _head_norm(s, s.num_key_value_heads),
    "attention_norm": lambda s: (_attended(s),),
    **{f"{part}_norm_in_proj": lambda s: (s.norm_gate_rank, s.hidden_size) for part in ("attention", "mlp")},
    **{f"{part}_norm_out_proj": lambda s: (s.hidden_size, s.norm_gate_rank) for part in ("attention", "mlp")},
    "attention_post_norm": _width,
    "mlp_norm": _width,
    "xielu_positive": lambda s: (1,),
    "xielu_negative": lambda s: (1,),
    "mlp_post_norm": _width,
    "loop_start": _width,
    "final_norm": _width,
    "lm_head": lambda s: (s.vocab_size, s.hidden_size),
    "head_dense": lambda s: (s.hidden_size, s.hidden_size),
    "head_norm": _width,
}
