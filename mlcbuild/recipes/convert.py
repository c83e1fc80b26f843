"""Valid file contents as the types of mlcbuild.recipes.types. Nothing is checked here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlcbuild.recipes.types import (
    Architecture,
    Model,
    Quantization,
    Source,
    Target,
    Template,
    Verify,
    Weights,
    linker_from_json,
)

Data = Mapping[str, Any]


def quantization(name: str, data: Data, others: Mapping[str, Data]) -> Quantization:
    """`others` are the contents of the quantizations that its overrides name."""
    keys = ("embedding", "lm_head", "rounding", "scheme_version")
    overrides = tuple((pattern, _weights(others[other])) for pattern, other in data.get("overrides", {}).items())
    return Quantization(
        name,
        kind=data["class"],
        model_dtype=data["model_dtype"],
        weights=_weights(data),
        overrides=overrides,
        format=name,
        **{key: data[key] for key in keys if key in data},
    )


def rounded_otherwise(name: str, data: Data, base: Quantization) -> Quantization:
    """The format `base` (it stays the format's name) with the rounding that `data` says."""
    return replace(base, name=name, rounding=data["rounding"])


def _weights(data: Data) -> Weights | None:
    return Weights(**{"group_size": 0, **data["weights"]}) if "weights" in data else None


def target(name: str, data: Data) -> Target:
    return Target(
        name,
        data["device"],
        data["library"],
        linker_from_json(data["linker"]),
        data["executes"],
        host={"kind": "llvm", **data["host"]} if "host" in data else {},
        activation_bits=data.get("activation_bits"),
        architectures=tuple(data.get("architectures", ())),
    )


def template(name: str, data: Data) -> Template:
    return Template(name, data)


def architecture(name: str, data: Data) -> Architecture:
    """`data` with everything inherited (mlcbuild.recipes.architectures)."""
    match = {key: tuple(values) for key, values in data.get("match", {"model_type": [name]}).items()}
    return Architecture(name, model_type=data.get("model_type", name), match=match, data=data)


def model(name: str, data: Data) -> Model:
    """`data` with everything inherited, and its paths absolute."""
    return Model(
        name,
        source=Source(**data["source"]),
        template=data["template"],
        architecture=data.get("architecture"),
        overrides=data.get("overrides", {}),
        verify=Verify(**data.get("verify", {})),
        delta_of=Source(**data["delta_of"]) if "delta_of" in data else None,
        lora=Source(**data["lora"]) if "lora" in data else None,
        calibration=data.get("calibration", {}).get("text"),
    )
