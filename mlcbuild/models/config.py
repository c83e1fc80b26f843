"""Hugging Face `config.json`, in the forms that transformers 4 and 5 write, brought to one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROPE_META = ("rope_theta", "rope_type", "type", "partial_rotary_factor")


def normalise(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config with `rope_theta` and `rope_scaling` where transformers 5 nests them in `rope_parameters`.

    `rope_scaling` comes out as None or as a mapping with the key `rope_type`; the kind "default" is None.
    """
    flat = dict(config)
    parameters = flat.pop("rope_parameters", None)
    if parameters:
        flat.setdefault("rope_theta", parameters.get("rope_theta"))
        if flat.get("partial_rotary_factor") is None and "partial_rotary_factor" in parameters:
            flat["partial_rotary_factor"] = parameters["partial_rotary_factor"]
        if flat.get("rope_scaling") is None:
            flat["rope_scaling"] = parameters
    if flat.get("rope_theta") is None:
        flat["rope_theta"] = 10000.0
    flat["rope_theta"] = float(flat["rope_theta"])
    flat["rope_scaling"] = _scaling(flat.get("rope_scaling"))
    return flat


def _scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not scaling:
        return None
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    values = {key: value for key, value in sorted(scaling.items()) if key not in _ROPE_META}
    return {"rope_type": kind, **values}
