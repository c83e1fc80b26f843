"""Hugging Face `config.json`, in the forms that transformers 4 and 5 write, brought to one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.numbers import is_number

_ROPE_META = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
_KINDS = {"su": "longrope"}  # what older Phi-3 checkpoints call it
_WITH_LENGTHS = ("dynamic", "yarn", "longrope")  # scalings that depend on how long texts the model was trained for


def normalise(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config with `rope_theta` and `rope_scaling` where transformers 5 nests them in `rope_parameters`.

    `rope_scaling` comes out as None or as a mapping with the key `rope_type`; the kind "default" is None. Where
    `rope_parameters` has one set for each type of layer, they are those of full attention, and the other theta is
    `rope_local_base_freq`, as in transformers 4. Raises MlcBuildError where one of them is no mapping.
    """
    flat = dict(config)
    parameters = _mapping(flat.pop("rope_parameters", None), "rope_parameters")
    if "full_attention" in parameters:
        local = _mapping(parameters.get("sliding_attention"), "rope_parameters.sliding_attention")
        flat.setdefault("rope_local_base_freq", local.get("rope_theta"))
        parameters = _mapping(parameters["full_attention"], "rope_parameters.full_attention")
    if parameters:
        flat.setdefault("rope_theta", parameters.get("rope_theta"))
        if flat.get("partial_rotary_factor") is None and "partial_rotary_factor" in parameters:
            flat["partial_rotary_factor"] = parameters["partial_rotary_factor"]
        if flat.get("rope_scaling") is None:
            flat["rope_scaling"] = parameters
    if is_number(flat.get("rope_theta")):
        flat["rope_theta"] = float(flat["rope_theta"])
    flat["rope_scaling"] = _scaling(_mapping(flat.get("rope_scaling"), "rope_scaling"), flat)
    return flat


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
    values = {key: value for key, value in scaling.items() if key not in _ROPE_META}
    if kind in _WITH_LENGTHS:
        longest = config.get("max_position_embeddings")
        values.setdefault("max_position_embeddings", longest)
        original = config.get("original_max_position_embeddings")  # Phi-3 has it beside the scaling, and means it
        if original is not None:
            values["original_max_position_embeddings"] = original
        elif kind != "dynamic":
            values.setdefault("original_max_position_embeddings", longest)
    return {"rope_type": kind, **dict(sorted(values.items()))}
