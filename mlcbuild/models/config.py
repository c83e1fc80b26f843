"""Hugging Face `config.json`: the forms that transformers 4 and 5 write, as one; its rope scaling, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlcbuild.errors import MlcBuildError

_ROPE_META = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
# What hybrids call types of layers whose attention has a state, and others do without it.
_TYPES = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
_SCORES = "llama_4_scaling_beta"  # of scores, not of rope: `normalise` puts it beside the scaling
# What older checkpoints of Phi-3 and Sarvam call them, and three positions of a token, which without images are one.
_KINDS = {"su": "longrope", "deepseek_yarn": "yarn", "mrope": "default"}
# Types of layers by which `rope_parameters` may be told: those that see all or choose, and those with a window.
_FULL, _LOCAL = ("full_attention", "indexed_attention"), "sliding_attention"
_WITH_LENGTHS = ("dynamic", "yarn", "longrope")  # scalings that depend on how long texts the model was trained for

# Numbers that a kind needs, and those that it may have.
_SCALING_NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor", "max_position_embeddings"), ()),
    "alpha": (("alpha",), ()),
    "ntk": (("factor",), ()),
    "proportional": (("partial_rotary_factor",), ("factor",)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (("original_max_position_embeddings",), ("factor", "attention_factor", "beta_fast", "beta_slow")),
    "longrope": (("original_max_position_embeddings",), ("factor", "attention_factor")),
}
_SCALING_LISTS = {"longrope": ("short_factor", "long_factor")}
_MSCALES = ("mscale", "mscale_all_dim")  # 0: as if it were not there
# What another kind reads stands in some configs, too; `finetuned` says that a model was trained with the scaling.
_HARMLESS = ("finetuned", "truncate", "mrope_section", "mrope_interleaved", *_MSCALES)
_SCALING_KEYS = {
    "rope_type", "max_position_embeddings", *_HARMLESS, *(key for keys in _SCALING_LISTS.values() for key in keys),
    *(key for both in _SCALING_NUMBERS.values() for keys in both for key in keys),
}  # fmt: skip


def normalise(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config with `rope_theta` and `rope_scaling` where transformers 5 nests them in `rope_parameters`.

    `rope_scaling` comes out as None or as a mapping with the key `rope_type`; the kind "default" is None. Where config
    says nothing of either, there is none. Where
    `rope_parameters` has one set for each type of layer, they are those of full attention, and the other theta is
    `rope_local_base_freq`, as in transformers 4; types that have null there are `rope_unturned`. Raises MlcBuildError
    where one of them is no mapping, and for a scaling of layers with a window.
    """
    flat = {key: _finite_or_not(value) for key, value in config.items()}
    silent = flat.get("rope_parameters") is None and not flat.get("rope_scaling")
    parameters = _mapping(flat.pop("rope_parameters", None), "rope_parameters")
    parameters = {_TYPES.get(name, name): value for name, value in parameters.items()}
    full = next((name for name in _FULL if name in parameters), None)
    if full is not None:
        local = _mapping(parameters.get(_LOCAL), f"rope_parameters.{_LOCAL}")
        flat.setdefault("rope_unturned", [kind for kind, own in parameters.items() if own is None] or None)
        flat.setdefault("rope_local_base_freq", local.get("rope_theta"))
        flat.setdefault("rope_local_partial_factor", local.get("partial_rotary_factor"))
        scaling = _scaling(local, flat)
        if scaling is not None:
            raise MlcBuildError(
                f"config.json: rope_parameters.sliding_attention has the rope_type {scaling['rope_type']!r}, but only "
                "layers of full attention are computed with a rope scaling"
            )
        parameters = _mapping(parameters[full], f"rope_parameters.{full}")
    if parameters:
        if "rope_theta" in parameters:
            flat.setdefault("rope_theta", parameters["rope_theta"])
        if flat.get("partial_rotary_factor") is None and "partial_rotary_factor" in parameters:
            flat["partial_rotary_factor"] = parameters["partial_rotary_factor"]
        if flat.get("rope_scaling") is None:
            flat["rope_scaling"] = parameters
    if flat.get("per_layer_config") is not None:
        flat["per_layer_config"] = _by_key(_mapping(flat["per_layer_config"], "per_layer_config"), flat)
    if is_number(flat.get("rope_theta")):
        flat["rope_theta"] = float(flat["rope_theta"])
    given = _mapping(flat.get("rope_scaling"), "rope_scaling")
    if _SCORES in given:
        flat[_SCORES] = given[_SCORES]
    flat["rope_scaling"] = _scaling(given, flat)
    if silent:  # so that an architecture's default counts, which one that says "default" does not have
        del flat["rope_scaling"]
    return flat


def _by_key(layers: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What transformers 5 writes where layers differ, {layer: {key: value}}, as {key: its values up to the
    last layer that has one}."""
    keys = {key for each in layers.values() for key in _mapping(each, "per_layer_config")}
    total = config.get("num_hidden_layers")
    if type(total) is not int:
        raise MlcBuildError("config.json: per_layer_config needs num_hidden_layers, a whole number")
    # Its keys are padded to one width: "05" and "11".
    numbered = {int(layer): each or {} for layer, each in layers.items() if layer.isdecimal()}
    if len(numbered) < len(layers) or any(layer >= total for layer in numbered):
        raise MlcBuildError(
            f"config.json: per_layer_config is of {', '.join(layers)!s:.100}, expected numbers of layers, each once "
            f"and below {total}"
        )
    return {key: [numbered.get(i, {}).get(key) for i in range(max(numbered, default=-1) + 1)] for key in keys}


def _finite_or_not(value: Any) -> Any:
    """transformers 5 writes infinity, which JSON has not, as {"__float__": "Infinity"}, in lists too."""
    if isinstance(value, list):
        return [_finite_or_not(each) for each in value]
    special = value.get("__float__") if isinstance(value, Mapping) else None
    return float(special) if special in ("Infinity", "-Infinity", "NaN") else value


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    """What is at `key`; nothing where there is null."""
    if value is not None and not isinstance(value, Mapping):
        raise MlcBuildError(f"config.json: {key} is {value!r}, expected an object")
    return value or {}


def _scaling(scaling: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    named = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None]
    kind = named[0] if named else "default"
    if not isinstance(kind, str):
        raise MlcBuildError(f"config.json: rope_type is {kind!r}, expected a text")
    if not named and scaling.get("factor") is not None:
        raise MlcBuildError(
            "config.json: rope_scaling has a `factor` and no `rope_type`: add it, linear or dynamic ..."
        )
    kind = _KINDS.get(kind, kind)
    if kind == "default":
        return None
    if kind == "dynamic" and scaling.get("alpha") is not None:
        kind = "alpha"  # what Hunyuan's checkpoints mean by it
    values = {key: value for key, value in scaling.items() if key not in (*_ROPE_META, _SCORES)}
    if kind == "proportional":
        values["partial_rotary_factor"] = scaling.get("partial_rotary_factor", 1.0)
    if kind in _WITH_LENGTHS:
        longest = config.get("max_position_embeddings")
        values.setdefault("max_position_embeddings", longest)
        original = config.get("original_max_position_embeddings")  # Phi-3 has it beside the scaling, and means it
        if original is not None:
            values["original_max_position_embeddings"] = original
        elif kind != "dynamic":
            values.setdefault("original_max_position_embeddings", longest)
    return {"rope_type": kind, **dict(sorted(values.items()))}


def scaling_problems(scaling: Mapping[str, Any], pairs: int) -> list[str]:
    """What is wrong with a `rope_scaling` of a known kind (see `normalise`), in a head with so many pairs."""
    kind = scaling["rope_type"]
    at = f"config.json: rope scaling `{kind}`"
    needed, more = _SCALING_NUMBERS[kind]
    if scaling.get("factor") is None and scaling.get("attention_factor") is None and kind in ("yarn", "longrope"):
        more += ("max_position_embeddings",)  # from which the factor follows
        needed += ("max_position_embeddings",)
    if kind == "yarn" and scaling.get("factor") is None:
        lengths = [scaling.get(key) for key in ("max_position_embeddings", "original_max_position_embeddings")]
        needed += ("factor",) if lengths[0] == lengths[1] else ()
    lists = _SCALING_LISTS.get(kind, ())
    found = [f"{at} needs the key {key!r}" for key in (*needed, *lists) if scaling.get(key) is None]
    found += [
        f"{at}: {key} is {scaling[key]!r}, expected a number above 0"
        for key in dict.fromkeys((*needed, *more))
        if scaling.get(key) is not None and not is_above(0, scaling[key])
    ]
    found += [
        f"{at}: {key} is {scaling[key]!r}, expected a number of at least 0"
        for key in _MSCALES
        if scaling.get(key) is not None and scaling[key] != 0 and not is_above(0, scaling[key])
    ]
    for key in lists:
        if scaling.get(key) is not None:
            found += _list(f"{at} has", key, scaling[key], pairs)
    if not found and kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        found.append(f"{at}: low_freq_factor is not below high_freq_factor")
    return found + [
        f"{at} does not know the key {key!r} ({value!r}), which may change what the model computes"
        for key, value in scaling.items()
        if key not in _SCALING_KEYS and value is not None
    ]


def _list(at: str, key: str, values: Any, pairs: int) -> list[str]:
    if not isinstance(values, Sequence) or not all(is_above(0, each) for each in values):
        return [f"{at} {values!r} in {key!r}, expected numbers above 0"]
    if len(values) == pairs:
        return []
    more = f"expected {pairs}: one for each pair of the {2 * pairs} rotary dimensions"
    return [f"{at} {len(values)} numbers in {key!r}, {more}"]


def is_number(value: Any) -> bool:
    """Whether a value out of a JSON file is a finite number; true and false are none."""
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def is_above(bound: float, value: Any) -> bool:
    return is_number(value) and value > bound
