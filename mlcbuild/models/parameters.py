"""The parameters of a model, by name, in MLC's order: what convert fills and the library asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from mlcbuild.models.parameter_shapes import query_rows, shape_of
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
        query_rows(s) // s.num_key_value_heads,
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
