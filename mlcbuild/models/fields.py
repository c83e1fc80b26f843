"""Fields of a structure read from `config.json` by the rules of an architecture file, and their checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.expressions import evaluate, names_in
from mlcbuild.models.numbers import is_above, is_number

Values = Mapping[str, Any]

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "context_window_size",
    "max_position_embeddings",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "rotary_dim",
    "sliding_window_size",
)
COUNTS = ("shared_expert_intermediate_size", "rescale_every", "time_mix_extra_dim", "time_decay_extra_dim")
NUMBERS = ("norm_offset", "embedding_scale", "residual_scale", "logits_scale", "routed_scaling_factor")
ABOVE = {  # what these are numbers above
    **dict.fromkeys(
        ("final_logit_softcapping", "attention_scale", "attn_logit_softcapping", "clip_qkv", "alibi_bias_max"), 0
    ),
    **dict.fromkeys(("rope_theta", "rope_local_theta"), 1),
}
CHOICES = {
    "norm": ("rms", "layer"),
    "norm_position": ("pre", "post", "both"),
    "residual": ("sequential", "parallel"),
    "mlp": ("gated", "plain"),
    "rope": ("full", "none"),
    "rope_pairing": ("halves", "neighbours"),
    "qk_norm": ("none", "head", "per_head", "all"),
    "gate": ("first", "second"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu", "relu2"),
}


def read(rules: Mapping[str, Any], config: Values, given: Values) -> tuple[dict[str, Any], list[str]]:
    """`given` and what the rules make of `config`, and what is wrong with it.

    A rule's `default` and `value` are expressions over `given` and the other rules' fields, wherever these stand. Names
    with `_` in front are for such expressions only.
    """
    values: dict[str, Any] = dict(given)
    problems = []
    waiting = dict(rules)

    def add(field: str) -> None:
        rule = waiting.pop(field)
        for name in names_in(rule.get("value", rule.get("default"))):
            if name in waiting:
                add(name)
        try:
            values[field] = value_of(rule, config, values)
        except MlcBuildError as error:
            problems.append(f"config.json: {error}")

    while waiting:
        add(next(iter(waiting)))
    return values, problems


def value_of(rule: Mapping[str, Any], config: Values, values: Values) -> Any:
    """What `{key, default, map}` or `{value}` makes of a config.

    Raises MlcBuildError where there is nothing to use, and for what is no truth value where the default is one.
    """
    if "value" in rule:
        return evaluate(rule["value"], values)
    names = keys(rule)
    for name in names:
        found = lookup(config, name)
        if found is not None:
            if "map" in rule:
                return _mapped(found, name, rule["map"])
            if isinstance(rule.get("default"), bool) and not isinstance(found, bool):
                raise MlcBuildError(f"{name} is {found!r}, expected true or false")
            return found
    if "default" in rule:
        return evaluate(rule["default"], values)
    raise MlcBuildError(f"`{'` or `'.join(names)}` is missing")


def keys(rule: Mapping[str, Any]) -> tuple[str, ...]:
    """The config's keys that a rule reads."""
    key = rule.get("key", ())
    return (key,) if isinstance(key, str) else tuple(key)


def lookup(config: Values, key: str) -> Any:
    """The value at `key`, or at `outer.inner`; None where there is none."""
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _mapped(value: Any, key: str, names: Mapping[str, Any]) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_mapped(each, key, names) for each in value)
    name = value if isinstance(value, str) else json.dumps(value)
    if name not in names:
        raise MlcBuildError(f"{key} is {value!r}, but this architecture computes only {' or '.join(map(repr, names))}")
    return names[name]


def check(values: Values) -> list[str]:
    """What is wrong with the types and ranges of fields."""
    problems = []
    for name in SIZES:
        value = values.get(name)
        endless = (name, value) == ("context_window_size", -1)
        if name in values and value is not None and not endless and (type(value) is not int or value < 1):
            problems.append(f"config.json: {name} is {value!r}, expected a whole number of at least 1")
    for name in COUNTS:
        value = values.get(name, 0)
        if value is not None and (type(value) is not int or value < 0):
            problems.append(f"config.json: {name} is {value!r}, expected a whole number")
    for name in NUMBERS:
        value = values.get(name)
        if value is not None and not is_number(value):
            problems.append(f"config.json: {name} is {value!r}, expected a number")
    for name, bound in ABOVE.items():
        value = values.get(name)
        if value is not None and not is_above(bound, value):
            problems.append(f"config.json: {name} is {value!r}, expected a number above {bound}")
    for name, words in (("norm_eps", "norm epsilon"), ("group_norm_eps", "epsilon of the norm over heads")):
        value = values.get(name, 0)
        if not is_number(value) or value < 0:
            problems.append(f"config.json: {words} is {value!r}, expected a number of at least 0")
    experts, chosen = (values.get(name) for name in ("num_experts", "num_experts_per_tok"))
    if not problems and experts is not None and chosen is not None and chosen > experts:
        problems.append(f"config.json: num_experts_per_tok is {chosen}, but there are only {experts} experts")
    for name, allowed in CHOICES.items():
        if name in values and values[name] not in allowed:
            problems.append(f"{name} is {values[name]!r}: the decoder computes only {', '.join(allowed)}")
    return problems
