"""Valid file contents as the types of mlcbuild.recipes.types.

Nothing is checked here, but for quantizations that are made of others: `format` (those bytes, rounded otherwise),
`overrides` and `formats` (those that a budget chooses among).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlcbuild.recipes.document import Document
from mlcbuild.recipes.problems import Problem, where
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
Place = tuple[str | int, ...]


def quantization(name: str, data: Data, others: Mapping[str, Data]) -> Quantization:
    """`others` are the contents of the quantizations that its overrides, or a budget, name."""
    keys = ("embedding", "lm_head", "rounding", "scheme_version", "bits_per_weight")
    overrides = tuple((pattern, _weights(others[other])) for pattern, other in data.get("overrides", {}).items())
    formats = tuple((other, _weights(others[other])) for other in data.get("formats", ()))
    budget: Data = {"embedding": "quantized", "lm_head": "quantized"} if formats else {}
    return Quantization(
        name,
        kind=data["class"],
        model_dtype=data["model_dtype"],
        weights=formats[0][1] if formats else _weights(data),
        overrides=overrides,
        formats=formats,
        format=name,
        **{key: value for key, value in {**budget, **data}.items() if key in keys},
    )


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
        tokenizer_from=Source(**data["tokenizer_from"]) if "tokenizer_from" in data else None,
        calibration=data.get("calibration", {}).get("text"),
    )


def quantizations(documents: Mapping[str, Document]) -> tuple[dict[str, Quantization], list[Problem]]:
    """Every quantization by name, sorted, and what is wrong with the names that they mention.

    One that names an unknown or damaged file is left out without another problem.
    """
    problems: list[Problem] = []
    plain = {name: each for name, each in documents.items() if "format" not in each.data}
    whole = {}
    for name, each in plain.items():
        mentioned: dict[Place, str] = {
            ("overrides", pattern): other for pattern, other in each.data.get("overrides", {}).items()
        }
        mentioned |= {("formats", at): other for at, other in enumerate(each.data.get("formats", ()))}
        if any(other not in documents for other in mentioned.values()):
            continue
        wrong = [problem for place, other in mentioned.items() for problem in _clashes(each, place, documents[other])]
        problems += wrong
        if wrong:
            continue
        others = {other: documents[other].data for other in mentioned.values()}
        made = quantization(name, each.data, others)
        if made.formats and (text := _no_scales(made, made.rounding, made.formats[0][0])):
            problems.append(each.problem(text, ("rounding",)))
        else:
            whole[name] = made
    for name, each in documents.items():
        base = each.data.get("format")
        if base in whole and (text := _no_scales(whole[base], each.data["rounding"], base)):
            problems.append(each.problem(text, ("rounding",)))
        elif base in whole:  # it stays the format's name
            whole[name] = replace(whole[base], name=name, rounding=each.data["rounding"])
        elif base in documents and "format" in documents[base].data:
            text = f"`format` is `{base}`, which is no format of its own; name the one whose bytes it has"
            problems.append(each.problem(text, ("format",)))
    return {name: whole[name] for name in sorted(whole)}, problems


def _no_scales(quantization: Quantization, rounding: str, name: str) -> str | None:
    """Why the rounding does not go with the format `name`; None where it does."""
    if rounding == "nearest" or _has_scales(quantization, rounding):
        return None
    able = "`nearest` or `gptq`" if _has_scales(quantization, "gptq") else "`nearest`"
    return f"`rounding` is `{rounding}`, expected {able} for the format `{name}`: there is no other scale to search for"


def _has_scales(quantization: Quantization, rounding: str) -> bool:
    """Whether the rounding has scales to search for: `gptq` in all groups, the others in symmetric ones."""
    weights = [quantization.weights, *(other for _, other in quantization.overrides)]
    return any(
        each is not None and each.scheme == "group" and (each.symmetric or rounding == "gptq") for each in weights
    )


def _clashes(document: Document, place: Place, other: Document) -> list[Problem]:
    """Why the file at `place`, an override's or one of a budget's formats, cannot be taken."""
    weights = _weights(other.data)
    if "format" in other.data:
        text = "which only rounds otherwise; name the format of its bytes"
    elif "formats" in other.data:
        text = "which is a budget itself; name a format"
    elif "overrides" in other.data:
        text = "which has overrides itself; name one without"
    elif other.data["model_dtype"] != document.data["model_dtype"]:
        text = (
            f"whose model_dtype is {other.data['model_dtype']}; "
            f"expected one with {document.data['model_dtype']}, as here"
        )
    elif place == ("formats", 0) and weights is None:
        text = "in which nothing is lost; name one with groups first: what the model loses in that is measured"
    elif place[0] == "formats" and weights is not None and weights.scheme != "group":
        text = f"whose weights are of scheme {weights.scheme}; a budget chooses among formats with groups, and q0 ones"
    else:
        return []
    return [document.problem(f"`{where(place)}` is `{other.file.name}`, {text}", place)]
