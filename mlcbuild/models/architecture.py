"""An architecture file applied to a `config.json`: the model's structure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.config import normalise
from mlcbuild.models.expressions import evaluate
from mlcbuild.models.structure import ParameterRule, Structure
from mlcbuild.recipes.types import Architecture

# A longer chunk makes prefill little faster and its buffers, which are planned for a full chunk, much larger.
_PREFILL_CHUNK_SIZE = 2048
_MAX_BATCH_SIZE = 128  # what mlc-ai compiles its own libraries for

_INTEGERS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "context_window_size",
)


def choose(
    architectures: Mapping[str, Architecture], config: Mapping[str, Any], wanted: str | None = None
) -> Architecture:
    """The architecture named `wanted`, or the one whose `match` fits config.json's `model_type`.

    Raises MlcBuildError when none fits, naming the nearest.
    """
    if wanted is not None:
        return architectures[wanted]
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise MlcBuildError(
            "config.json has no `model_type`: add it, or name the `architecture` in the model's YAML file"
        )
    for architecture in architectures.values():
        if model_type in architecture.match.get("model_type", ()):
            return architecture
    known = sorted({name for a in architectures.values() for name in a.match.get("model_type", ())})
    raise MlcBuildError(
        f"config.json: model_type `{model_type}` is an unknown architecture{_nearest(model_type, known)}; "
        f"known are: {', '.join(known)}. A new one is a YAML file in recipes/architectures/"
    )


def resolve(architecture: Architecture, config: Mapping[str, Any], overrides: Mapping[str, int]) -> Structure:
    """The structure that `config` describes under `architecture`, with the recipe's `overrides` on top.

    Raises MlcBuildError for a key that is missing, of the wrong type or out of range, and for a choice that the
    architecture's blocks cannot express. All such problems are in the one error.
    """
    flat = normalise(config)
    data = architecture.data
    problems: list[str] = []
    values: dict[str, Any] = {"rope_theta": flat["rope_theta"], "rope_scaling": flat["rope_scaling"]}
    for field, rule in data["config"].items():
        try:
            values[field] = _field(rule, flat, values)
        except MlcBuildError as error:
            problems.append(f"config.json: {error}")
    problems += _check_types(values) + _check_requirements(data, flat)
    if problems:
        raise MlcBuildError("\n".join(problems))
    values.update(_limits(values["context_window_size"], overrides))
    problems = _check_shape(values) + _check_limits(values)
    if problems:
        raise MlcBuildError("\n".join(problems))
    choices = {name: value for name, value in data["decoder"].items() if name != "rope_scaling"}
    rules = tuple(
        ParameterRule(rule["role"], rule["name"], _sources(rule))
        for rule in data["parameters"]
        if evaluate(rule.get("when", True), values)
    )
    return Structure(
        architecture=architecture.name,
        model_type=architecture.model_type,
        rules=rules,
        ignored=tuple(data.get("ignore", ())),
        **choices,
        **values,
    )


def model_config(architecture: Architecture, structure: Structure) -> dict[str, Any]:
    """The `model_config` of mlc-chat-config.json: MLC's keys, in MLC's order."""
    fields = structure.to_json()
    config = {key: fields[field] for key, field in architecture.data["model_config"].items()}
    theta = config.get("position_embedding_base")
    if isinstance(theta, float) and theta.is_integer():
        config["position_embedding_base"] = int(theta)
    return config


def _sources(rule: Mapping[str, Any]) -> tuple[str, ...]:
    source = rule.get("from", rule["name"])
    return (source,) if isinstance(source, str) else tuple(source)


def _field(rule: Mapping[str, Any], config: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    keys = [rule["key"]] if isinstance(rule["key"], str) else rule["key"]
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    if "default" in rule:
        return evaluate(rule["default"], values)
    raise MlcBuildError(f"`{'` or `'.join(keys)}` is missing")


def _check_types(values: Mapping[str, Any]) -> list[str]:
    problems = []
    for name in _INTEGERS:
        value = values.get(name)
        if name in values and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            problems.append(f"config.json: {name} is {value!r}, expected a whole number of at least 1")
    if "norm_eps" in values and not isinstance(values["norm_eps"], float | int):
        problems.append(f"config.json: norm epsilon is {values['norm_eps']!r}, expected a number")
    return problems


def _check_requirements(data: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, allowed in data.get("require", {}).items():
        if key in config and config[key] is not None and config[key] not in allowed:
            problems.append(
                f"config.json: {key} is {config[key]!r}, but this architecture computes only "
                f"{' or '.join(map(repr, allowed))}"
            )
    scaling = config["rope_scaling"]
    known = data["decoder"].get("rope_scaling", ())
    if scaling is not None and scaling["rope_type"] not in known:
        problems.append(
            f"config.json: rope scaling `{scaling['rope_type']}` is not one that this architecture computes "
            f"({', '.join(known) or 'none'})"
        )
    return problems


def _check_shape(values: Mapping[str, Any]) -> list[str]:
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % kv_heads:
        return [f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"]
    return []


def _limits(context: int, overrides: Mapping[str, int]) -> dict[str, int]:
    limits = {"context_window_size": context, **overrides}
    limits.setdefault("prefill_chunk_size", min(limits["context_window_size"], _PREFILL_CHUNK_SIZE))
    limits.setdefault("max_batch_size", _MAX_BATCH_SIZE)
    return limits


def _check_limits(values: Mapping[str, Any]) -> list[str]:
    problems = []
    for name in ("tensor_parallel_shards", "pipeline_parallel_stages"):
        if values.get(name, 1) != 1:
            problems.append(f"overrides: {name} is {values[name]}, but only 1 is implemented")
    if values["prefill_chunk_size"] > values["context_window_size"]:
        problems.append(
            f"overrides: prefill_chunk_size {values['prefill_chunk_size']} is larger than context_window_size "
            f"{values['context_window_size']}"
        )
    return problems


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""
