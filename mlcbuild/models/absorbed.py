"""Latent attention whose KV cache has latents: which models have that, and the parameters that it takes.

A head's key is W_k l beside what is turned, its value W_v l, where l is the token's normed latent. So its scores are
(W_k^T q) · l, and what it returns is W_v times a sum of latents: attention in which all heads have one key, the latent
and the turned part, whose first numbers are its value (DeepSeek-AI, arXiv 2405.04434, 2.1.2, "absorbed"). That is a row
of kv_lora_rank + rotary_dim numbers for each token, and one for each query. The KV cache holds a key and a value of one
width: a row's first half is the key there and its second one the value, and the two halves of a query are two heads.
Attention's kernels join them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mlcbuild.models.rules import ParameterRule
from mlcbuild.models.structure import Structure

_WIDEST = 576  # numbers of a row that attention's kernels take
_PARTS = {"latent_keys_proj": ("w_uk", "latent_keys"), "latent_values_proj": ("w_uv", "latent_values")}


def applied(structure: Structure) -> Structure:
    """The structure with what its KV cache holds: latents, where kernels take them and they are fewer numbers."""
    s = structure
    if not s.absorbed:
        return s
    _, _, half = replace(s, indexer=()).cache_heads
    one_by_one = s.position_scale or s.clip_qkv or s.qk_norm != "none" or s.query_gate or s.differential
    apart = s.by_layer or s.keys_from or s.rope_local_theta or s.alibi_bias_max or s.roles() & {"sinks", "query_scale"}
    if one_by_one or apart or 2 * half > _WIDEST or half >= s.num_key_value_heads * s.head_dim:
        return replace(s, whole_keys=True)
    return replace(s, rules=tuple(part for rule in s.rules for part in _parts(rule)))


def _parts(rule: ParameterRule) -> Iterator[ParameterRule]:
    """`kv_b_proj` by what MLC calls its halves: w_uk [heads, kv_lora_rank, K] and w_uv [heads, V, kv_lora_rank]."""
    if rule.role != "kv_b_proj":
        yield rule
        return
    place = rule.name.removesuffix("kv_b_proj.weight")
    for role, (name, convert) in _PARTS.items():
        yield replace(rule, role=role, name=f"{place}{name}.weight", convert=(convert,))
