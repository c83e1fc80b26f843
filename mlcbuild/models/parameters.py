"""The parameters of a model, by name, in MLC's order: what convert fills and the library asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from mlcbuild.models.structure import ParameterRule, Structure


@dataclass(frozen=True)
class Parameter:
    """An unquantized parameter.

    `shape` is `[N out, K in]` for matrices. `sources` are checkpoint tensors whose rows, one after the other, are
    the parameter's rows.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    sources: tuple[str, ...]
    layer: int | None = None


def shape_of(role: str, structure: Structure) -> tuple[int, ...]:
    """The shape of the parameter that plays `role` in one layer, or outside the layers.

    Raises KeyError for a role that no block has.
    """
    s = structure
    query, key_value = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
    return {
        "embedding": (s.vocab_size, s.hidden_size),
        "qkv_proj": (query + 2 * key_value, s.hidden_size),
        "o_proj": (s.hidden_size, query),
        "gate_up_proj": (2 * s.intermediate_size, s.hidden_size),
        "down_proj": (s.hidden_size, s.intermediate_size),
        "attention_norm": (s.hidden_size,),
        "mlp_norm": (s.hidden_size,),
        "final_norm": (s.hidden_size,),
        "lm_head": (s.vocab_size, s.hidden_size),
    }[role]


def parameters(structure: Structure) -> tuple[Parameter, ...]:
    """Every parameter of the model in MLC's order, which is the order in which a library takes them."""
    return tuple(
        Parameter(
            name=rule.name.replace("{i}", str(layer)),
            shape=shape_of(rule.role, structure),
            role=rule.role,
            sources=tuple(source.replace("{i}", str(layer)) for source in rule.sources),
            layer=layer,
        )
        for rule, layer in _ordered(structure)
    )


def count(structure: Structure) -> int:
    """How many values all parameters have together."""
    layers = structure.num_hidden_layers
    return sum(prod(shape_of(r.role, structure)) * (layers if r.per_layer else 1) for r in structure.rules)


def ignored(structure: Structure) -> tuple[str, ...]:
    """Names of checkpoint tensors that may be present and are not needed."""
    names = []
    for name in structure.ignored:
        layers = range(structure.num_hidden_layers) if "{i}" in name else (0,)
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
                    yield layer_rule, layer
