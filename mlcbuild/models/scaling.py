"""What config.json says of rope scaling, checked while planning: the arithmetic is mlcbuild.models.rope's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlcbuild.models.numbers import is_above

# Numbers that a kind needs, and those that it may have.
_NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor", "max_position_embeddings"), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (("original_max_position_embeddings",), ("factor", "attention_factor", "beta_fast", "beta_slow")),
    "longrope": (("original_max_position_embeddings",), ("factor", "attention_factor")),
}
_LISTS = {"longrope": ("short_factor", "long_factor")}
_MSCALES = ("mscale", "mscale_all_dim")  # 0: as if it were not there
# What another kind reads stands in some configs, too; `finetuned` says that a model was trained with the scaling.
_HARMLESS = ("finetuned", "truncate", *_MSCALES)


def problems(scaling: Mapping[str, Any], pairs: int) -> list[str]:
    """What is wrong with a `rope_scaling` of a known kind (mlcbuild.models.config), in a head with so many pairs."""
    kind = scaling["rope_type"]
    at = f"config.json: rope scaling `{kind}`"
    needed, more = _NUMBERS[kind]
    if scaling.get("factor") is None and scaling.get("attention_factor") is None and kind in ("yarn", "longrope"):
        more += ("max_position_embeddings",)  # from which the factor follows
        needed += ("max_position_embeddings",)
    if kind == "yarn" and scaling.get("factor") is None:
        lengths = [scaling.get(key) for key in ("max_position_embeddings", "original_max_position_embeddings")]
        needed += ("factor",) if lengths[0] == lengths[1] else ()
    lists = _LISTS.get(kind, ())
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
        if key not in _KNOWN and value is not None
    ]


def _list(at: str, key: str, values: Any, pairs: int) -> list[str]:
    if not isinstance(values, Sequence) or not all(is_above(0, each) for each in values):
        return [f"{at} {values!r} in {key!r}, expected numbers above 0"]
    if len(values) == pairs:
        return []
    more = f"expected {pairs}: one for each pair of the {2 * pairs} rotary dimensions"
    return [f"{at} {len(values)} numbers in {key!r}, {more}"]


_KNOWN = {
    "rope_type", "max_position_embeddings", *_HARMLESS, *(key for keys in _LISTS.values() for key in keys),
    *(key for both in _NUMBERS.values() for keys in both for key in keys),
}  # fmt: skip
