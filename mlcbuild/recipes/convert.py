"""Valid file contents as the types of mlcbuild.recipes.types. Nothing is checked here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlcbuild.recipes.types import Architecture, Linker, Model, Quantization, Source, Target, Template, Verify, Weights

Data = Mapping[str, Any]


def quantization(name: str, data: Data) -> Quantization:
    weights = Weights(**data["weights"]) if "weights" in data else None
    choices = {key: data[key] for key in ("embedding", "lm_head", "rounding") if key in data}
    return Quantization(name, kind=data["class"], model_dtype=data["model_dtype"], weights=weights, **choices)


def target(name: str, data: Data) -> Target:
    linker: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data["linker"].items()}
    return Target(name, data["device"], data["library"], Linker(**linker), data["executes"])


def template(name: str, data: Data) -> Template:
    return Template(name, data)


def architecture(name: str, data: Data) -> Architecture:
    match = {key: tuple(values) for key, values in data["match"].items()}
    return Architecture(name, model_type=data["model_type"], match=match, data=data)


def model(name: str, data: Data) -> Model:
    """`data` with everything inherited, and its paths absolute."""
    return Model(
        name,
        source=Source(**data["source"]),
        template=data["template"],
        architecture=data.get("architecture"),
        overrides=data.get("overrides", {}),
        verify=Verify(**data.get("verify", {})),
    )
