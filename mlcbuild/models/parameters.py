"""The parameters of a model, by name, in MLC's order: what convert fills and the library asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from mlcbuild.models import mixers
from mlcbuild.models.kinds import HYBRID, RECURRENT, recurrent_shapes
from mlcbuild.models.ngrams import ngrams_of
from mlcbuild.models.rules import ParameterRule
from mlcbuild.models.structure import Structure


@dataclass(frozen=True)
class Parameter:
    """An unquantized parameter.

    `shape` is `[N out, K in]` for matrices, `[experts, N, K]` for those of experts, whose biases are `[experts, N]`.
    `sources` are checkpoint tensors whose rows, one after the other, are the parameter's rows, `alternative` those that
    a checkpoint may have instead. Each is changed as `convert` says:

    transpose    the checkpoint has [K, N]
    ungroup_qkv  its rows are, for each of `groups` key-value heads: that group's queries, its key, its value
    latent_keys, latent_values
                 its rows are each head's key and its value: keys are wanted, transposed, or values
    by_expert    it has [experts * N, K], and where there are several, each expert's rows are joined
    deinterleave every expert's rows are: gate, up, gate, up ...
    evens_first  its rows are one of the parameter's first half and one of its second, in turn
    join_heads   its first two axes are one of the parameter's, where it has one axis more
    ungroup_qvk  its rows are, for each of four groups: queries, values, keys
    first_rows, last_rows
                 it has more rows, which are left out
    add_one      the checkpoint has w - 1
    differential it has the vectors q1, k1, q2, k2: exp(q1 · k1) - exp(q2 · k2) + b and 1 - b are wanted, where b is
                 0.8 - 0.6 * exp(-0.3 * layer)
    softplus     the checkpoint has w where ln(1 + exp(w)) is wanted
    unit_rows    its rows are divided by their lengths
    negative_exp, exp_negative_exp
                 the checkpoint has w where -exp(w) or exp(-exp(w)) is wanted
    halve        the checkpoint has 2 ** halvings times the parameter
    times        the checkpoint has it divided by `times`
    square, absolute
                 the checkpoint has w where w * w or |w| is wanted

    `users` are later layers that have it, too. `dtype` is what it is stored in, None for the quantization's model
    dtype. `groups` holds, for qkv parameters and those of latents, the number of key-value heads and the rows of
    queries, of the key and of the value in each group.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    sources: tuple[str, ...]
    layer: int | None = None
    convert: tuple[str, ...] = ()
    dtype: str | None = None
    users: tuple[int, ...] = ()
    groups: tuple[int, int, int, int] | None = None
    alternative: tuple[str, ...] = ()
    halvings: int = 0
    times: float = 1.0

    @property
    def is_matrix(self) -> bool:
        """Whether it is multiplied with or looked up in. Norms of all heads have two axes, too."""
        return len(self.shape) > 1 and not self.role.endswith(("_norm", "_norm_bias", "_up_bias", "_down_bias"))

    @property
    def stored(self) -> tuple[int, ...]:
        """Its shape in a checkpoint, of one tensor, where nothing but latents' keys and values is converted."""
        if not self.role.startswith("latent_"):
            return self.shape
        assert self.groups is not None
        heads, _, key, value = self.groups
        return heads * (key + value), self.shape[1] if self.role == "latent_keys_proj" else self.shape[2]

    def joined(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A checkpoint tensor's shape once `join_heads` is done."""
        joins = "join_heads" in self.convert and len(shape) == len(self.shape) + 1
        return (shape[0] * shape[1], *shape[2:]) if joins else shape


TABLES = (
    "embedding",
    "position_embedding",
    "token_type_embedding",
    "per_layer_embedding",
    *("experts_in_rows", "experts_out_rows", "ngram_embedding"),
)  # roles that are looked up by row
# Roles outside the layers, by the pieces of a model that use them (mlcbuild.models.layer_pieces, encoder_pieces).
EMBED = ("embedding",)
BEGINNING = (
    *("position_embedding", "token_type_embedding", "embedding_norm", "embedding_norm_bias"),
    *("embedding_proj", "embedding_bias", "embedding_factor", "embedding_factor_shift"),
)
FINAL_NORM = (
    *("head_mix", "head_mix_bias", "head_mix_scale"),
    *("final_norm", "final_norm_bias", "head_dense", "head_dense_bias", "head_norm", "head_norm_bias"),
)


PARTS = (
    "attention",
    "mlp",
    "final",
)  # what is given a mixture of several hidden states (mlcbuild.models.hybrid.residuals)
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


def _query(s: Structure) -> int:
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
    "qkv_proj": lambda s: ((1 + s.query_gate) * _query(s) + _key(s) + _value(s), _attended(s)),
    "q_proj": lambda s: ((1 + s.query_gate) * _query(s), _attended(s)),
    "k_proj": lambda s: (_key(s), _attended(s)),
    "v_proj": lambda s: (_value(s) // (2 if s.convolutions else 1), _attended(s)),
    "v_before_proj": lambda s: (_value(s) // 2, s.hidden_size),
    "qk_convolution": lambda s: (_query(s) + _key(s), 1, s.convolutions[0]),
    "qk_mixing": lambda s: (_query(s) + _key(s), s.head_dim, s.convolutions[1]),
    "key_scale": lambda s: (s.num_key_value_heads,),
    **{f"{name}_adapter_a_proj": lambda s: (s.adapter_rank, _attended(s)) for name in ("q", "k", "v")},
    "q_adapter_b_proj": lambda s: (_query(s), s.adapter_rank),
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
    **{f"{part}_{of}{end}": _width for part in PARTS for of in ("residual", "returned") for end in ("", "_shift")},
    **dict.fromkeys(("attention_rate", "mlp_rate", "embedding_factor", "embedding_factor_shift"), _width),
    "query_scale": lambda s: (_query(s),),
    "sinks": lambda s: (s.num_attention_heads,),
    "o_proj": lambda s: (s.hidden_size, s.num_attention_heads * _value_width(s)),
    "difference": lambda s: (2,),
    "o_norm": lambda s: (s.num_attention_heads * (s.value_head_dim or s.head_dim),),
    "q_a_proj": lambda s: (s.q_lora_rank, s.hidden_size),
    "q_a_norm": lambda s: (s.q_lora_rank,),
    "q_b_proj": lambda s: (
        _query(s) + (s.num_attention_heads * s.value_head_dim if s.query_gate else 0),
        s.q_lora_rank * (1 + s.raw_query_latent),
    ),
    "kv_a_proj": lambda s: (s.kv_lora_rank + (s.rotary_dim or 0), s.hidden_size),
    "kv_a_norm": lambda s: (s.kv_lora_rank,),
    "k_turned_norm": lambda s: (s.rotary_dim or 0,),
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
    **{f"{part}_mixture_norm": lambda s: (s.streams * s.hidden_size,) for part in PARTS},
    **{f"{part}_mixture_in_proj": lambda s: (s.mixture_rank, s.streams * s.hidden_size) for part in PARTS},
    **{f"{part}_mixture_out_proj": lambda s: (s.streams * s.hidden_size, s.mixture_rank) for part in PARTS},
    **{f"{part}_injection": lambda s: (s.streams, s.streams * s.hidden_size) for part in PARTS},
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


def parameters(structure: Structure) -> tuple[Parameter, ...]:
    """Every parameter of the model in MLC's order, which is the order in which a library takes them."""
    users = _users(structure)
    return tuple(
        Parameter(
            name=_name(rule, layer),
            shape=shape_of(rule.role, own := structure if layer is None else structure.at(layer)),
            role=rule.role,
            sources=_named(rule.sources, layer, rule, structure),
            alternative=_named(rule.alternative, layer, rule, structure),
            layer=layer,
            convert=_convert(rule, halvings := _halvings(structure, layer)),
            dtype=rule.dtype,
            times=rule.times,
            users=users.get(_name(rule, layer), ()),
            groups=_groups(own, rule.role),
            halvings=halvings,
        )
        for rule, layer in _ordered(structure)
        if layer not in users.get(_name(rule, layer), ())
    )


def _name(rule: ParameterRule, layer: int | None) -> str:
    return rule.named(rule.name, layer).replace("{i}", str(layer))


def _users(structure: Structure) -> dict[str, tuple[int, ...]]:
    """For the names of parameters that layers have together, those layers but the first."""
    found: dict[str, list[int]] = {}
    for rule, layer in _ordered(structure) if any(rule.numbers for rule in structure.rules) else ():
        if rule.numbers and layer is not None:
            found.setdefault(_name(rule, layer), []).append(layer)
    return {name: tuple(layers[1:]) for name, layers in found.items() if len(layers) > 1}


def count(structure: Structure) -> int:
    """How many values all parameters have together."""
    return sum(_count(rule, structure) for rule in structure.rules)


def _count(rule: ParameterRule, structure: Structure) -> int:
    if not rule.per_layer:
        return prod(shape_of(rule.role, structure))
    layers = range(structure.num_hidden_layers) if rule.layers is None else rule.layers
    if rule.numbers:
        return prod(shape_of(rule.role, structure)) * len({_name(rule, layer) for layer in layers})
    if structure.by_layer:
        return sum(prod(shape_of(rule.role, structure.at(layer))) for layer in layers)
    return prod(shape_of(rule.role, structure)) * len(layers)


def _halvings(s: Structure, layer: int | None) -> int:
    """How often hidden states were halved before this layer."""
    return layer // s.rescale_every if layer is not None and s.rescale_every else 0


def _convert(rule: ParameterRule, halvings: int) -> tuple[str, ...]:
    """What really changes: the first layers' matrices stay what they are in the checkpoint."""
    return rule.convert if halvings else tuple(name for name in rule.convert if name != "halve")


def _groups(s: Structure, role: str) -> tuple[int, int, int, int] | None:
    if role.startswith("latent_"):
        return s.num_attention_heads, 0, s.qk_head_dim - (s.rotary_dim or 0), s.value_head_dim
    if not role.startswith("qkv_"):
        return None
    return (
        s.num_key_value_heads,
        _query(s) // s.num_key_value_heads,
        s.qk_head_dim or s.head_dim,
        s.value_head_dim or s.head_dim,
    )


def ignored(structure: Structure) -> tuple[str, ...]:
    """Names of checkpoint tensors that may be present and are not needed; `*` in a name is any text.

    `{n}` is the number of layers: the first of those that the model has beside its own; `{o}` each layer of the
    checkpoint that is none of the model's, up to the last (`source_layers`).
    """
    names, mine = [], structure.source_layers or ()
    others = [layer for layer in range(max(mine, default=-1) + 2) if layer not in mine]
    for name in structure.ignored:
        layers = range(structure.num_hidden_layers) if "{i}" in name else (0,)
        name = name.replace("{n}", str(structure.num_hidden_layers))
        if "{o}" in name:
            names += [name.replace("{o}", str(layer)) for layer in others]
            continue
        names += [name.replace("{i}", str(layer)) for layer in layers]
    return tuple(names)


def _ordered(structure: Structure) -> Iterator[tuple[ParameterRule, int | None]]:
    """(rule, layer) pairs, layer None outside the layers; the per-layer rules repeat as a whole for each layer."""
    rules = structure.rules
    per_layer = [rule for rule in rules if rule.per_layer]
    before = True
    for rule in rules:
        if not rule.per_layer:
            yield rule, None
        elif before:
            before = False
            for layer in range(structure.num_hidden_layers):
                for layer_rule in per_layer:
                    if layer_rule.layers is None or layer in layer_rule.layers:
                        yield layer_rule, layer


def _named(sources: Sequence[str], layer: int | None, rule: ParameterRule, structure: Structure) -> tuple[str, ...]:
    """Tensor names for one layer; where they have `{e}`, all of them for the first expert, then for the next; `{s}` is
    each shard of a table of n-grams.

    `{h}` is each row of a norm per head: each head of queries, or of keys.
    """
    number = layer if layer is None or structure.source_layers is None else structure.source_layers[layer]
    here = tuple(rule.named(source, layer).replace("{i}", str(number)) for source in sources)
    for letter in ("{e}", "{h}", "{s}"):
        if any(letter in source for source in here):
            count = structure.ngrams[-1] if letter == "{s}" else structure.num_experts
            count = shape_of(rule.role, structure)[0] if letter == "{h}" else count
            here = tuple(source.replace(letter, str(number)) for number in range(count) for source in here)
    return here
