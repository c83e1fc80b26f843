"""The part of a model that its compiled library depends on, as plain data.

A `Structure` is what `config.json`, the architecture file and the recipe's overrides say together. Two models with
equal `library_json()` share one library: the vocabulary's size stays symbolic there, and checkpoint tensor names
matter to conversion only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlcbuild.models.rules import ParameterRule, choice, library_rule, rule_from_json, tuples, without_defaults

ATTENDING = ("full", "sliding", "both")  # types of layers with keys and values in the cache
KEEPING = ("state", "both")  # and of those with a state of one size

# Fields that an architecture's file may give a value for each layer; the largest is what the KV cache is made for.
BY_LAYER = (
    "num_attention_heads",
    "num_key_value_heads",
    "qk_head_dim",
    "value_head_dim",
    "intermediate_size",
    "rope_theta",
    "rotary_dim",
    "activation_sparsity",
    "kv_lora_rank",
    "q_lora_rank",
    "ngram_table",
)


@dataclass(frozen=True)
class Structure:
    """A model's dimensions and choices. Field names are those of Hugging Face configs where one exists.

    kind              decoder; hybrid, whose layer_types may also be `state` (a mixer with a state of one size in place
                      of attention), `both` or `mlp` (neither); others (mlcbuild.models.kinds) leave most as it is
    norm              rms, layer (with a bias and a weight where parameters play these roles)
    final_norm_eps    of the norm before the head, where it is not norm_eps
    norm_position     pre: of what attention and MLP are given; post: of what they return; both; sum: of the sums with
                      what they were given, and no norm before the head
    norm_offset       what is added to a norm's weight; norm_weights: whether rms norms have any; norm_first: whether
                      the first layer's attention is given its input normed; norm_embeddings: whether embeddings are
                      normed without a parameter in the role `embedding_norm`. norm_length: rms norms without weights
                      divide by the length of what they are given, not by its root mean square; inner_norms: whether
                      what the last matrices of attention and MLP are given is normed without a weight.
                      norm_gate_rank: width of gates of norms, where parameters play these roles (Decoder.norm)
    residual          sequential: attention, then the MLP; parallel: both of x, normed once if there is no `mlp_norm`
    mlp               gated: down(activation(gate(x)) * up(x)); plain: down(activation(up(x)))
    input_bits        that what a layer's matrices are multiplied with is rounded to (arXiv 2402.17764); 0: it is not
    activation        silu, gelu, gelu_tanh, relu, relu2; xielu, of plain ones: with two trained numbers for each layer
    gate              which half of gate_up_proj is the gate: first, second
    head_activation   between a matrix before the head (`head_dense`) and its norm (`head_norm`)
    embedding_scale   what hidden states are multiplied with before the first layer, residual_scale what attention
                      and MLP return, logits_scale what the head is given
    rope              full: rotary positions; none: of another kind, or none. rotary_dim: how many dimensions of a head
                      are turned (None: all); rope_pairing: halves, a dimension with that half of them further, or
                      neighbours; rope_backwards: turned the other way
    rope_local_theta  theta of `sliding` layers, not scaled then. rope_layers: which have positions; None: all
    attention_scale   of scores, None for head_dim ** -0.5; attn_logit_softcapping c: scores become c * tanh(scores / c)
    chunked           layers of type `sliding` see what is in their own chunk of so many positions
    position_scale    b: a query at position p counts 1 + b * ln(1 + floor(p / position_scale_length)) times.
                      position_scale_power: (1 + (p + 1) / position_scale_length) ** b instead.
                      position_scale_unturned: only in layers without rotary positions, and p + 1 instead of p
    sliding_window_size  how many positions a token sees, its own included, in layers of type `sliding`: in all where
                      there are no layer_types (for each layer, full or sliding)
    keys_from         for each layer, the one whose keys and values it reads; None: its own. per_layer_size: numbers
                      that a table of per_layer_rows gives each layer for a token (mlcbuild.models.per_layer)
    joins             for each layer that begins a stack, the one whose input is added to its own, -1 for all others.
                      Such inputs are normed, without a weight, but layer 0's, to which a vector is added where a
                      parameter is `loop_start` (mlcbuild.models.entry_points)
    streams           hidden states of a token: mlcbuild.models.streams (with laurel_rank, and activation_sparsity, the
                      part of an MLP's gates that is cut off), hyper (hyper_magnitude, hyper_eps), or of hybrids
                      hybrid.residuals (mixture_rank: width of the product that mixes them)
    ngrams            of tables of hashed n-grams, ngram_table: which a layer has, from 1 on, 0: none (models.ngrams)
    qk_norm           of queries and keys before they are turned: none; head: each head by the one weight; per_head: by
                      its own; all: all heads as one vector; unit: each head without a weight, in layers with rotary
                      positions only. Its kind is `norm`'s, with a bias where parameters play these roles.
                      qk_norm_last: after they are turned
    alibi_bias_max    b: a score is lowered by the distance of query and key, times 2 ** (-b * h / heads) in head h
    differential      whether attention is the difference of two (mlcbuild.models.heads; arXiv 2410.05258)
    query_gate        whether the matrix of queries gives for each head a gate besides, of what the head returns: of a
                      head of latent attention as wide as its value
    clip_qkv          c: queries, keys and values become min(max(x, -c), c)
    qk_head_dim, value_head_dim  numbers of a head's query and key, and of its value, where heads of the KV cache,
                      head_dim wide, have more: the rest is zeros (mlcbuild.models.heads). 0: head_dim
    value_norm        whether heads of values are normed, without a weight. router_scale: of a router's logits
    keys_as_values    whether layers without `v_proj` take their keys, before these are normed, as values
    by_layer          fields that layers differ in (BY_LAYER), each with its value in every layer. The structure's own
                      value is the largest
    kv_lora_rank      width of the vector that a token's keys and values are made of; 0: they are made of hidden states.
                      mlcbuild.models.latent has the fields of latent attention; indexer: mlcbuild.models.indexer
    final_logit_softcapping  c: logits become c * tanh(logits / c). value_scale: what values are multiplied with
    max_position_embeddings  rows of a learned `position_embedding`. position_offset: the row of a text's first token
    sinusoidal        whether positions are sines and cosines, added to embeddings: of position + position_offset.
                      sinusoidal_open: frequencies end one step above 1 / 10000
    embedding         of a model of texts: MLC's embedding_metadata, as its library tells it
    rescale_every     recurrent: layers after which hidden states are halved; 0: never. group_norm_eps: of the norm over
                      each head's output. time_mix_extra_dim, time_decay_extra_dim: widths of low-rank products
    mixer             hybrid: what layers of type `state` and `both` have; mlcbuild.models.mixers describes its fields
    type_vocab_size   encoder: rows of `token_type_embedding`. embedding_size: width of its tables, where it is another
    optional_prefix   what tensor names begin with, or leave out; source_layers: the checkpoint's number of each layer
    wrapped           whether the checkpoint has another model beside this one (mlcbuild.models.wrappers)
    num_experts       experts of a layer that has a `router`. Each token goes to num_experts_per_tok of them, which
                      count by their probabilities (with norm_topk_prob divided by their sum), times
                      routed_scaling_factor; and to shared ones, where there are parameters of them. scoring,
                      expert_groups, expert_groups_per_tok, expert_group_best, expert_groups_zeroed, router_jitter:
                      mlcbuild.models.routers
    zero_experts      more experts that a router may choose, which return what they are given, or with
                      zero_experts_return false nothing. shortcut: layers have experts beside their MLP, whose sum is
                      added after the next layer only, which has none (LongCat-Flash, arXiv 2509.01322, 2.1 and 2.2)
    key_experts       experts of one row beside an MLP, of which a token has key_experts_per_tok (models.product_keys)
    router_width      of what a router with an MLP makes of hidden states and the layer before's router; 0: none has
    moe_latent_size   width of what routed experts are given, where it is not hidden_size; 0: it is
    experts_averaged  whether what routed experts return and what shared ones do is averaged, and not added
    router_logit_softcapping  c: a router's logits become c * tanh(logits / c)
    attention_gate    what becomes of the gate that attention has where parameters play that role: sigmoid, softplus
    expert_input_scaled  whether shares multiply what experts are given, and not what they return
    swiglu_limit      c: gated MLPs of experts are (min(max(up, -c), c) + swiglu_offset) * g * sigmoid(swiglu_alpha *
                      g), where g is min(gate, c); None: they are as `mlp` says. swiglu_dense: all others, too
    """

    architecture: str
    model_type: str
    # dimensions
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    tie_word_embeddings: bool
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    # choices
    norm: str
    mlp: str
    activation: str
    rope: str
    # parameters
    rules: tuple[ParameterRule, ...]
    ignored: tuple[str, ...]
    # limits
    context_window_size: int
    prefill_chunk_size: int
    max_batch_size: int
    tensor_parallel_shards: int = 1
    pipeline_parallel_stages: int = 1
    disaggregation: bool = False
    # choices that not every decoder has
    norm_position: str = choice("pre")
    final_norm_eps: float | None = choice(None)
    norm_offset: float = choice(0.0)
    norm_weights: bool = choice(True)
    norm_embeddings: bool = choice(False)
    norm_length: bool = choice(False)
    inner_norms: bool = choice(False)
    norm_first: bool = choice(True)
    head_activation: str = choice("gelu")
    residual: str = choice("sequential")
    gate: str = choice("first")
    embedding_scale: float = choice(1.0)
    residual_scale: float = choice(1.0)
    logits_scale: float = choice(1.0)
    final_logit_softcapping: float | None = choice(None)
    max_position_embeddings: int | None = choice(None)
    position_offset: int = choice(0)
    sinusoidal: bool = choice(False)
    sinusoidal_open: bool = choice(False)
    optional_prefix: str = choice("")
    source_layers: tuple[int, ...] | None = choice(None)
    wrapped: bool = choice(False)
    num_experts: int = choice(0)
    num_experts_per_tok: int = choice(0)
    moe_intermediate_size: int = choice(0)
    shared_expert_intermediate_size: int = choice(0)
    zero_experts: int = choice(0)
    zero_experts_return: bool = choice(True)
    router_width: int = choice(0)
    key_experts: int = choice(0)
    key_experts_per_tok: int = choice(0)
    shortcut: bool = choice(False)
    moe_latent_size: int = choice(0)
    norm_topk_prob: bool = choice(False)
    routed_scaling_factor: float = choice(1.0)
    scoring: str = choice("softmax")
    router_jitter: float = choice(0.0)
    expert_groups: int = choice(1)
    expert_groups_per_tok: int = choice(1)
    expert_group_best: int = choice(2)
    expert_groups_zeroed: bool = choice(False)
    rope_pairing: str = choice("halves")
    rotary_dim: int | None = choice(None)
    rope_local_theta: float | None = choice(None)
    rope_layers: tuple[bool, ...] | None = choice(None)
    attention_scale: float | None = choice(None)
    attn_logit_softcapping: float | None = choice(None)
    position_scale: float | None = choice(None)
    position_scale_length: int = choice(0)
    position_scale_power: bool = choice(False)
    position_scale_unturned: bool = choice(False)
    chunked: bool = choice(False)
    sliding_window_size: int | None = choice(None)
    layer_types: tuple[str, ...] | None = choice(None)
    keys_from: tuple[int, ...] | None = choice(None)
    joins: tuple[int, ...] | None = choice(None)
    per_layer_size: int = choice(0)
    per_layer_rows: int = choice(0)
    streams: int = choice(1)
    mixture_rank: int = choice(0)
    ngrams: tuple[int, ...] = choice(())
    ngram_table: int = choice(0)
    laurel_rank: int = choice(0)
    hyper: bool = choice(False)
    hyper_magnitude: float = choice(2.0)
    hyper_eps: float = choice(1e-6)
    activation_sparsity: float = choice(0.0)
    qk_norm: str = choice("none")
    qk_norm_last: bool = choice(False)
    rope_backwards: bool = choice(False)
    query_gate: bool = choice(False)
    differential: bool = choice(False)
    clip_qkv: float | None = choice(None)
    alibi_bias_max: float | None = choice(None)
    kv_lora_rank: int = choice(0)
    q_lora_rank: int = choice(0)
    whole_keys: bool = choice(False)
    indexer: tuple[Any, ...] = choice(())
    long_latents: bool = choice(False)
    latent_eps: float = choice(1e-6)
    raw_query_latent: bool = choice(False)
    norm_gate_rank: int = choice(0)
    value_scale: float = choice(1.0)
    input_bits: int = choice(0)
    value_norm: bool = choice(False)
    keys_as_values: bool = choice(False)
    router_scale: float = choice(1.0)
    experts_averaged: bool = choice(False)
    router_logit_softcapping: float | None = choice(None)
    attention_gate: str = choice("sigmoid")
    expert_input_scaled: bool = choice(False)
    swiglu_limit: float | None = choice(None)
    swiglu_alpha: float = choice(1.0)
    swiglu_offset: float = choice(1.0)
    swiglu_dense: bool = choice(False)
    by_layer: tuple[tuple[str, tuple[Any, ...]], ...] = choice(())
    qk_head_dim: int = choice(0)
    value_head_dim: int = choice(0)
    kind: str = choice("decoder")
    embedding: Mapping[str, Any] | None = choice(None)
    rescale_every: int = choice(0)
    group_norm_eps: float = choice(0.0)
    time_mix_extra_dim: int = choice(0)
    time_decay_extra_dim: int = choice(0)
    type_vocab_size: int = choice(0)
    embedding_size: int | None = choice(None)
    mixer: str = choice("")
    state_heads: int = choice(0)
    state_head_dim: int = choice(0)
    state_groups: int = choice(1)
    mixer_scale: float = choice(1.0)
    mixer_scales: tuple[float, ...] = choice(())
    mixer_out_scale: float = choice(1.0)
    attention_in_scale: float = choice(1.0)
    attention_out_scale: float = choice(1.0)
    gate_scale: float = choice(1.0)
    residual_normed: bool = choice(False)
    kept_scale: float = choice(1.0)
    mlp_out_scale: float = choice(1.0)
    beta_scale: float = choice(1.0)
    state_gate: str = choice("silu")
    attention_into_mixer: bool = choice(False)
    adapter_rank: int = choice(0)
    convolutions: tuple[int, ...] = choice(())
    decay_limit: float | None = choice(None)
    gate_softcapping: float | None = choice(None)
    state_norm_first: bool = choice(False)
    state_size: int = choice(0)
    conv_kernel: int = choice(0)
    time_step_rank: int = choice(0)
    time_step_limits: tuple[float, float] = choice((0.0, 1e30))
    state_norm_eps: float | None = choice(None)

    def to_json(self) -> dict[str, Any]:
        """Every field but choices at their default, JSON-able, such that `from_json` gives an equal structure."""
        fields = without_defaults(self)
        fields["rules"] = [without_defaults(rule) for rule in self.rules]
        return fields

    def library_json(self) -> dict[str, Any]:
        """The fields that a compiled library depends on."""
        fields = self.to_json()
        for name in ("architecture", "vocab_size", "ignored", "optional_prefix", "source_layers", "wrapped"):
            fields.pop(name, None)
        fields["rules"] = [library_rule(rule) for rule in self.rules]
        return fields

    def roles(self) -> frozenset[str]:
        """What the parameters are used as: what a model does not have has none."""
        return frozenset(rule.role for rule in self.rules)

    def layer_type(self, number: int) -> str:
        """full or sliding, of hybrids also state, both, mlp: what layers differ in beside their weights."""
        if self.layer_types is not None:
            return self.layer_types[number]
        return "full" if self.sliding_window_size is None else "sliding"

    def numbers(self, *types: str) -> tuple[int, ...]:
        """The layers of these types."""
        return tuple(layer for layer in range(self.num_hidden_layers) if self.layer_type(layer) in types)

    def borrows(self, number: int) -> bool:
        """Whether a layer reads the keys and values of another."""
        return self.keys_from is not None and self.keys_from[number] != number

    @property
    def keeping(self) -> tuple[int, ...]:
        """The layers with a state of one size: of a mixer, or of convolutions in attention."""
        return self.numbers(*KEEPING, *(ATTENDING if self.convolutions else ()))

    @property
    def cached(self) -> tuple[int, ...]:
        """The layers whose keys and values are in the KV cache."""
        return tuple(layer for layer in self.numbers(*ATTENDING) if not self.borrows(layer))

    @property
    def absorbed(self) -> bool:
        """Whether the KV cache has latents in place of keys and values."""
        return self.kv_lora_rank > 0 and not self.whole_keys

    @property
    def cache_heads(self) -> tuple[int, int, int]:
        """Heads of queries and of keys in the KV cache, and their width: halves of rows, and an indexer's, too."""
        chosen, heads, index, *_ = self.indexer or (0, 0, 0)
        queries, keys, width = self.num_attention_heads, self.num_key_value_heads + (chosen > 0), self.head_dim
        if self.absorbed:
            half = -(-(self.kv_lora_rank + (self.rotary_dim or 0) + index) // 2)
            queries, keys, width = 2 * queries, 1, max(-(-half // 16) * 16, 32)
        return queries + -(-max(heads * (index + 1), 8 * chosen) // width), keys, width

    def turns(self, number: int) -> bool:
        """Whether a layer has rotary positions."""
        return self.rope != "none" and (self.rope_layers is None or self.rope_layers[number])

    def at(self, layer: int) -> Structure:
        """The structure with what is this layer's own: as the KV cache has it, where layers do not differ."""
        own = {name: values[layer] for name, values in self.by_layer}
        return dataclasses.replace(self, **own, by_layer=()) if own else self

    def computed(self, layer: int) -> tuple[Any, ...]:
        """What layers that compute differently differ in, beside the parameters that they have."""
        differing = (values[layer] for _, values in self.by_layer)
        return (self.layer_type(layer), self.turns(layer), self.borrows(layer), *differing)

    @property
    def layer_kinds(self) -> tuple[int, ...]:
        """For each layer the number of its kind, counted in the order in which kinds first occur: 0, 1, 1, 0 ..."""
        some = {rule.layers for rule in self.rules if rule.layers is not None}
        if not (some or self.by_layer or self.layer_types or self.rope_layers or self.keys_from):
            return (0,) * self.num_hidden_layers
        having, seen = [frozenset(layers) for layers in some], dict[Any, int]()
        return tuple(seen.setdefault(self._layer_kind(i, having), len(seen)) for i in range(self.num_hidden_layers))

    def _layer_kind(self, layer: int, having: Sequence[frozenset[int]]) -> Any:
        """What layers that compute differently differ in; `having`: those that have what others lack."""
        return (*self.computed(layer), *(layer in layers for layers in having))

    @functools.cached_property
    def digest(self) -> str:
        """sha256 (hex) of `library_json()`."""
        return hashlib.sha256(json.dumps(self.library_json(), sort_keys=True).encode()).hexdigest()

    @property
    def label(self) -> str:
        """A short name for task names and symbol prefixes: `llama-1f0c93aa`."""
        return f"{self.model_type}-{self.digest[:8]}"


def from_json(data: Mapping[str, Any]) -> Structure:
    """The inverse of `Structure.to_json`."""
    fields = {**data, "rules": tuple(map(rule_from_json, data["rules"]))}
    fields["by_layer"] = tuple((name, tuple(values)) for name, values in fields.get("by_layer", ()))
    return Structure(**tuples(fields))


def from_library_json(data: Mapping[str, Any]) -> Structure:
    """A structure with the given `library_json()`; what libraries do not depend on is left empty."""
    rules = [
        {"role": role, "name": name, "sources": (), **(more[0] if more else {})} for role, name, *more in data["rules"]
    ]
    return from_json({"architecture": "", "vocab_size": 1, "ignored": (), **data, "rules": rules})
