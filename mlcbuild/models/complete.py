"""Whether an architecture's parameters are what its decoder computes with: none missing, none of no use, none twice.

A file that says `mlp: plain` and lists a `gate_up_proj` would else be computed in one of both ways, and compared with
itself when the package is verified.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations

from mlcbuild.models import mixers
from mlcbuild.models.kinds import DECODER, HYBRID
from mlcbuild.models.rules import ParameterRule
from mlcbuild.models.structure import ATTENDING, KEEPING, Structure

_ONE_BY_ONE = {"q_proj", "k_proj", "v_proj"}
_LATENT = {"kv_a_proj", "kv_a_norm", "kv_b_proj"}
_NARROW_QUERY = {"q_a_proj", "q_a_norm", "q_b_proj"}
_INDEX = {"index_query", "index_key", "index_norm", "index_norm_bias", "index_weights"}
_STREAMS = {f"streams_{name}" for name in ("router", "predict", "correct", "norm", "scale")}
_STREAMS |= {"laurel_in_proj", "laurel_out_proj", "laurel_norm"}
_BESIDE = {"router_norm", "experts_norm", "experts_post_norm", "dense_post_norm"}
_CONVOLVED = {"v_before_proj", "key_scale", "qk_convolution", "qk_convolution_bias", "qk_mixing", "qk_mixing_bias"}
_NARROW_ROUTER = {"router_in", "router_1", "router_2"}
_NARROW_EXPERTS = {"experts_in_proj", "experts_out_proj"}


def problems(structure: Structure) -> list[str]:
    """A sentence for each parameter that is wrong. Of kinds without attention only those that are listed twice."""
    found = list(_repeated(structure.rules))
    if structure.kind not in (DECODER, HYBRID):
        return found
    outside = {rule.role for rule in structure.rules if not rule.per_layer}
    found += _compared(outside, *_outside(structure), "outside the layers")
    kinds = structure.layer_kinds
    for layer in (kinds.index(kind) for kind in sorted(set(kinds))):
        mine = {r.role for r in structure.rules if r.per_layer and (r.layers is None or layer in r.layers)}
        parts = _layer(structure, mine, layer) if structure.kind == DECODER else _hybrid(structure, mine, layer)
        found += _compared(mine, *parts, f"in layer {layer}")
    return found


def _mixed(*parts: str) -> set[str]:
    """The roles of hyper-connections."""
    return {f"{part}_mix{end}" for part in parts for end in ("", "_bias", "_scale")}


def _repeated(rules: Iterable[ParameterRule]) -> Iterator[str]:
    for one, other in combinations(rules, 2):
        apart = one.layers is not None and other.layers is not None and not {*one.layers} & {*other.layers}
        if one.name == other.name and not apart:
            yield f"two parameters are called {one.name}"
        elif one.role == other.role and one.per_layer == other.per_layer and not apart:
            yield f"two parameters have the role `{one.role}`: {one.name} and {other.name}"


def _compared(roles: set[str], needed: set[str], used: set[str], where: str) -> Iterator[str]:
    for role in sorted(needed - roles):
        yield f"no parameter has the role `{role}` {where}, and the decoder needs it; names with `{{i}}` are of layers"
    for role in sorted(roles - needed - used):
        yield f"a parameter has the role `{role}`, of which the decoder makes no use {where}"


def _outside(s: Structure) -> tuple[set[str], set[str]]:
    """The roles that are needed outside the layers, and those that may be there."""
    needed = {"embedding"}
    if s.embedding is None and not s.tie_word_embeddings:
        needed.add("lm_head")
    last = set() if s.norm_position == "sum" or s.mixture_rank else {"final_norm"}
    norms = last if s.norm == "rms" and s.norm_weights else set()
    if s.per_layer_size:
        needed |= {"per_layer_embedding", "per_layer_proj", "per_layer_norm"}
    if s.mixture_rank:
        needed |= _mixture("final")
    elif s.hyper:
        needed |= _mixed("head")
    elif s.streams > 1:
        needed |= {"streams_proj", *(f"streams_out_{number}_proj" for number in range(1, s.streams))}
    biases = _biases(s, (*last, "embedding_norm", "head_norm"))
    used = {
        *last,
        "embedding_norm",
        "embedding_factor",
        "embedding_factor_shift",
        "position_embedding",
        "lm_head",
        "lm_head_bias",
        "lm_head_scale",
        *biases,
    }
    used |= {"loop_start"} if s.joins is not None else set()
    return needed | norms, used | {"head_dense", "head_dense_bias", "head_norm"}


def _mixture(part: str) -> set[str]:
    return {f"{part}_mixture_{name}" for name in ("norm", "in_proj", "out_proj")}


def _layer(s: Structure, roles: set[str], layer: int) -> tuple[set[str], set[str]]:
    """The same for a layer, as far as its other parameters decide."""
    (needed, used), (more, more_used) = _attention(s, roles), _mlp(s, roles)
    needed -= {"k_proj", "v_proj", "k_norm"} if s.borrows(layer) else set()
    needed, used = needed | more, used | more_used | {"layer_scale"}
    used |= {f"{part}_{way}" for part in ("attention", "mlp") for way in ("residual", "residual_shift", "rate")}
    gated = {part for part in ("attention", "mlp") if f"{part}_norm_in_proj" in roles}
    needed |= {f"{part}_norm_{end}_proj" for part in gated for end in ("in", "out")}
    needed |= _mixed("attention", "mlp") if s.hyper else _STREAMS if s.streams > 1 else set()
    needed |= {f"per_layer_{name}" for name in ("gate_proj", "out_proj", "post_norm")} if s.per_layer_size else set()
    norms = {f"{part}_norm" for part in ("attention", "mlp") if s.norm_position != "post"}
    norms |= {f"{part}_post_norm" for part in ("attention", "mlp") if s.norm_position in ("post", "both")}
    used |= norms | {"mlp_post_norm"} | set(_biases(s, norms))  # A.X K1 norms what experts return, and no plain MLP
    if s.norm == "rms" and s.norm_weights:
        needed |= norms - ({"mlp_norm"} if s.residual == "parallel" else set())
    return needed, used


def _hybrid(s: Structure, roles: set[str], layer: int) -> tuple[set[str], set[str]]:
    """The same for a layer of a hybrid, whose norms are those that it has weights for."""
    kind = s.layer_type(layer)
    parts = [_attention(s, roles)] if kind in ATTENDING else []
    parts += [mixers.roles(s)] if kind in KEEPING else []
    parts += [_mlp(s, roles)] if roles & {"router", "down_proj"} else []
    norms = {f"{part}_{when}norm" for part in ("attention", "mlp") for when in ("", "post_")}
    used = norms | set(_biases(s, norms))
    ways = ("residual", "returned")
    used |= {f"{part}_{way}{end}" for part in ("attention", "mlp") for way in ways for end in ("", "_shift")}
    if s.at(layer).ngram_table:
        names = ("embedding", "key_proj", "value_proj", "convolution", "key_norm", "query_norm", "value_norm")
        parts.append(({f"ngram_{name}" for name in names}, set()))
    for part in ("attention", "mlp") if s.mixture_rank else ():
        parts.append(({*_mixture(part), f"{part}_injection"}, set()))
    if s.attention_into_mixer:
        parts.append(({"mixer_norm", *({"into_mixer_proj"} if kind == "both" else ())}, set()))
    return set[str]().union(*(needed for needed, _ in parts)), used.union(*(also for _, also in parts))


def _attention(s: Structure, roles: set[str]) -> tuple[set[str], set[str]]:
    if "attention_router" in roles:
        needed = {"attention_router", "kv_proj", *(f"attention_experts_{of}" for of in ("q_proj", "o_proj", "bias"))}
    elif s.kv_lora_rank:
        needed = {"o_proj", *_LATENT, *(_NARROW_QUERY if s.q_lora_rank else {"q_proj"})}
        needed |= {"k_turned_norm"} & roles
        needed |= _INDEX if s.indexer and roles & _INDEX else set()
    else:
        needed = {"o_proj", *(_ONE_BY_ONE if roles & _ONE_BY_ONE else {"qkv_proj"})}
        needed -= {"v_proj"} if s.keys_as_values and "v_proj" not in roles else set()
    needed |= _CONVOLVED if s.convolutions else set()
    needed |= {"difference"} if s.differential else set()
    used = {f"{name}_bias" for name in ("qkv", "q", "k", "v", "v_before", "q_a", "kv_a", "o")}
    used |= {f"{name}_adapter_{end}_proj" for name in "qkv" for end in "ab"} if s.adapter_rank else set()
    used |= {"key_step_proj", "key_step_bias", "key_rate"}
    used |= {
        "query_scale",
        "attention_gate_scale",
        "attention_gate",
        "attention_gate_bias",
        "attention_head_gate",
        "sinks",
        "o_norm",
    }
    if s.qk_norm not in ("none", "unit") and s.norm_weights:
        needed |= {"q_norm", "k_norm"}
        used |= {"q_norm_bias", "k_norm_bias"}
    return needed, used


def _mlp(s: Structure, roles: set[str]) -> tuple[set[str], set[str]]:
    used = {f"{name}_{of}" for name in ("gate_up", "gate", "up", "down") for of in ("bias", "scale")}
    if "router" in roles:
        up = "up" if s.mlp == "plain" else "gate_up"
        shared = {f"shared_{up}_proj", "shared_down_proj"}
        needed = {f"experts_{up}_proj", "experts_down_proj", *(shared if roles & shared else ())}
        needed |= _NARROW_EXPERTS if s.moe_latent_size else set()
        used |= {"router", "router_bias", "router_correction", "shared_gate", f"shared_{up}_bias", "shared_down_bias"}
        used |= {"experts_down_bias", "expert_scale", "experts_in_bias", "experts_out_bias", "experts_sum_bias"}
        needed |= {"router_inner_norm", *_NARROW_ROUTER} if s.router_width else set()
        used |= {"router_carry", *(f"{role}_bias" for role in _NARROW_ROUTER)} if s.router_width else set()
        used |= {"experts_gate_up_bias"} if up == "gate_up" else set()
        needed |= {"down_proj", "gate_up_proj", *(() if s.shortcut else _BESIDE)} if "down_proj" in roles else set()
    elif s.mlp == "plain":
        needed = {"up_proj", "down_proj"}
    else:
        needed = {"down_proj", *({"gate_proj", "up_proj"} if "gate_proj" in roles else {"gate_up_proj"})}
    needed |= {"key_router", "experts_in_rows", "experts_out_rows"} if s.key_experts else set()
    used |= {"down_norm", *({"gate_up_adapter_a_proj", "gate_up_adapter_b_proj"} if s.adapter_rank else ())}
    if s.activation == "xielu":
        needed |= {"xielu_positive", "xielu_negative"}
    return needed, used


def _biases(s: Structure, norms: Iterable[str]) -> Iterator[str]:
    """Those of norms: rms norms have none."""
    return (f"{norm}_bias" for norm in norms if s.norm == "layer" or s.norm_offset)
