"""Keys of a `config.json` that an architecture does not read, and which architectures are near to a config.

A key that changes the computation and is not known must not be passed over in silence. `harmless_keys.json` lists those
of no architecture in particular that change nothing here: training, tokens, sampling, how another program computes.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.fields import evaluate, keys, lookup, names_in, value_of
from mlcbuild.recipes.types import Architecture

_READ = (
    "model_type",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "quantization_config",
    "quantization",  # MLX's own word for it
)  # by name, in code
# What `normalise` has under a name of its own, and where it has it from.
_FROM = {"rope_local_partial_factor": "rope_parameters.sliding_attention.partial_rotary_factor"}
_OWN = "per_layer_config"  # of whose keys each has to be read
_SHOWN = 3  # architectures that a message names


def unknown_keys(architecture: Architecture, config: Mapping[str, Any]) -> list[str]:
    """Keys with a value that the architecture neither reads nor says to be harmless."""
    data = architecture.data
    rules = [*data["config"].values(), *(rule for rule in data["model_config"].values() if isinstance(rule, Mapping))]
    read = {key for rule in rules for key in keys(rule)}
    known = {key.split(".")[0] for key in read}
    known |= {*_READ, *data.get("require", ()), *data.get("harmless", ()), *_harmless()}
    found = [key for key, value in config.items() if value is not None and key not in known and not key.startswith("_")]
    own = f"{_OWN}.{{}}".format
    read |= {*data.get("harmless", ())}
    return found + [own(key) for key in config.get(_OWN) or () if _OWN in known and own(key) not in read]


def complaints(architecture: Architecture, config: Mapping[str, Any]) -> list[str]:
    """A problem for each unknown key."""
    return [
        f"config.json: architecture `{architecture.name}` does not know the key `{_FROM.get(key, key)}` "
        f"({json.dumps(config.get(key, lookup(config, key)))}), "
        "which may change what the model computes; if it does not, list it as `harmless` in "
        f"recipes/architectures/{architecture.name}.yaml"
        for key in unknown_keys(architecture, config)
    ]


def nearest(architectures: Iterable[Architecture], config: Mapping[str, Any]) -> str:
    """Sentences: those that read most of the config, and what each does not know or does not find in it.

    Not those that refuse it, or have an indexer where it has none. Among equals, the first is the one whose defaults
    are most like it. No key says how rope pairs dimensions, where positions begin or which norm is meant. So none is
    promised to fit.
    """
    ranked = sorted(
        (
            (missing_keys(each, config), unknown_keys(each, config), unlike(each, config), each.name)
            for each in architectures
            if not refuses(each, config) and _indexes_as(each, config)
        ),
        key=lambda found: (2 * len(found[0]) + len(found[1]), *found[2:]),
    )
    lines = []
    for missing, unknown, _, name in ranked[:_SHOWN]:
        parts = [f"does not know {_list(unknown)}"] if unknown else []
        parts += [f"misses {_list(missing)}"] if missing else []
        lines.append(f"  {name}: {'; '.join(parts) or 'knows every key, which does not say that it computes the same'}")
    return "\n".join(lines)


def _indexes_as(architecture: Architecture, config: Mapping[str, Any]) -> bool:
    """Whether the config has the indexer (`context_at_most`) that the architecture has, if that has one."""
    name = architecture.data.get("context_at_most")
    return name is None or any(lookup(config, key) is not None for key in keys(architecture.data["config"][name]))


def missing_keys(architecture: Architecture, config: Mapping[str, Any]) -> list[str]:
    """Keys that the architecture needs and the config does not have."""
    rules = [rule for rule in architecture.data["config"].values() if "value" not in rule and "default" not in rule]
    return [" or ".join(keys(rule)) for rule in rules if all(lookup(config, key) is None for key in keys(rule))]


def refuses(architecture: Architecture, config: Mapping[str, Any]) -> bool:
    """Whether the config has a value that the architecture's `require` does not allow."""
    return not all(allows(allowed, config, key) for key, allowed in architecture.data.get("require", {}).items())


def allows(allowed: Sequence[Any], config: Mapping[str, Any], key: str) -> bool:
    """Whether `config` has one of these values at `key`, or that of a key that is named there; or none at all."""
    value = config.get(key)
    return value is None or value in allowed or any(isinstance(a, str) and config.get(a) == value for a in allowed)


def unlike(architecture: Architecture, config: Mapping[str, Any]) -> int:
    """How many values of the config are not what the architecture's rules have where there are none."""
    count = 0
    for rule in architecture.data["config"].values():
        if "default" not in rule or names_in(rule["default"]) or all(lookup(config, key) is None for key in keys(rule)):
            continue
        try:
            count += value_of(rule, config, {}) != evaluate(rule["default"], {})
        except MlcBuildError:  # no value of its map
            count += 1
    return count


def close_to(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def _list(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


@cache
def _harmless() -> frozenset[str]:
    found = json.loads((Path(__file__).parent / "harmless_keys.json").read_text(encoding="utf-8"))
    return frozenset(key for group in found.values() for key in group)
