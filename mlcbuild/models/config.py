"""Hugging Face `config.json`, in the forms that transformers 4 and 5 write, brought to one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROPE_META = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
_KINDS = {"su": "longrope"}  # what older Phi-3 checkpoints call it
_WITH_LENGTHS = ("dynamic", "yarn", "longrope")  # scalings that depend on how long texts the model was trained for


def normalise(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config with `rope_theta` and `rope_scaling` where transformers 5 nests them in `rope_parameters`.

    `rope_scaling` comes out as None or as a mapping with the key `rope_type`; the kind "default" is None. Where
    `rope_parameters` has one set for each type of layer, they are those of full attention, and the other theta is
    `rope_local_base_freq`, as in transformers 4.
    """
    flat = dict(config)
    parameters = flat.pop("rope_parameters", None)
    if parameters and "full_attention" in parameters:
        local = parameters.get("sliding_attention") or {}
        flat.setdefault("rope_local_base_freq", local.get("rope_theta"))
        parameters = parameters["full_attention"]
    if parameters:
        flat.setdefault("rope_theta", parameters.get("rope_theta"))
        if flat.get("partial_rotary_factor") is None and "partial_rotary_factor" in parameters:
            flat["partial_rotary_factor"] = parameters["partial_rotary_factor"]
        if flat.get("rope_scaling") is None:
            flat["rope_scaling"] = parameters
    if flat.get("rope_theta") is not None:
        flat["rope_theta"] = float(flat["rope_theta"])
    flat["rope_scaling"] = _scaling(flat.get("rope_scaling"), flat)
    return flat


def _scaling(scaling: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, Any] | None:
    if not scaling:
        return None
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
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
