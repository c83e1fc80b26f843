"""A quantization that is a budget: each kind of matrix gets one of some formats, so that a number has so many bits.

A kind is a role (`qkv_proj`, `embedding`): all layers are packed alike, so that they share the functions of a library.
What is lost is given by kind and format and adds up (docs/quantization.md says how well). The choice that loses least
within the budget is exact: kinds are few, and of what the first ones can take and lose only the choices stay for which
no other takes less and loses less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Protocol

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization.schemes import STORAGE_BITS, packed, quantized_parameters
from mlcbuild.recipes.types import CHOICE, Quantization, quantization_json

_BITS = {**STORAGE_BITS, "float32": 32, "float16": 16, "bfloat16": 16}

Choice = Mapping[str, str]  # role -> name of the format


class Files(Protocol):
    """The files of an artifact."""

    def read_json(self, name: str) -> Any: ...


def kinds(parameters: Sequence[Parameter], quantization: Quantization) -> list[str]:
    """The roles that a budget chooses formats for, in the order in which they occur."""
    return list(dict.fromkeys(p.role for p in parameters if packed(p, quantization) is not None))


def bits(parameters: Sequence[Parameter], quantization: Quantization) -> dict[str, dict[str, int]]:
    """What all matrices of a kind take in each format, by kind and format; "" is all that is not chosen for.

    Raises MlcBuildError for a matrix that a format cannot pack.
    """
    found: dict[str, dict[str, int]] = {"": {"": 0}}
    roles = {parameter.name: parameter.role for parameter in parameters}
    chosen = kinds(parameters, quantization)
    for name, _ in quantization.formats:
        whole = resolved(quantization, dict.fromkeys(chosen, name))
        for kind in ("", *chosen):
            found.setdefault(kind, {})["" if kind == "" else name] = 0
        for tensor in quantized_parameters(parameters, whole):
            role = roles[tensor.source]
            kind, of = (role, name) if role in chosen else ("", "")
            found[kind][of] += prod(tensor.shape) * _BITS[tensor.dtype]
    return found


def choose(
    most: float, taken: Mapping[str, Mapping[str, int]], lost: Mapping[str, Mapping[str, float]], numbers: int
) -> tuple[Choice, float, float]:
    """The format of each kind of `lost`, so that least is lost in `most` bits a number; then both figures of it.

    `taken` as `bits` gives it; `numbers` is how many the model has. Raises MlcBuildError where nothing is so small.
    """
    front: list[tuple[int, float, Choice]] = [(taken[""][""], 0.0, {})]
    for kind, of in lost.items():
        every: list[tuple[int, float, Choice]] = [
            (size + taken[kind][name], loss + share, {**choice, kind: name})
            for size, loss, choice in front
            for name, share in of.items()
        ]
        front, least = [], float("inf")
        for size, loss, choice in sorted(every, key=lambda each: each[:2]):
            if loss < least:
                front.append((size, loss, choice))
                least = loss
    within = [each for each in front if each[0] <= most * numbers]
    if not within:
        least = -(-100 * front[0][0] // numbers) / 100  # rounded up: so many are enough
        raise MlcBuildError(
            f"bits_per_weight {most:g}: this model takes {least:.2f} in the smallest of the formats; "
            "say at least so many, or name a format with fewer bits"
        )
    size, loss, choice = within[-1]
    return choice, size / numbers, loss


def resolved(quantization: Quantization, choice: Choice) -> Quantization:
    """The quantization that a choice makes of a budget."""
    formats = dict(quantization.formats)
    return replace(quantization, overrides=tuple((kind, formats[name]) for kind, name in choice.items()))


def fields_of(fields: Mapping[str, Any], inputs: Mapping[str, Files]) -> dict[str, Any]:
    """A step's field `quantization`, with what was chosen for it where it is a budget's."""
    given: dict[str, Any] = dict(fields["quantization"])
    if "budget" in inputs:
        given["overrides"] = inputs["budget"].read_json(CHOICE)
    return given


def choice_json(quantization: Quantization, choice: Choice) -> list[Any]:
    """The content of choice.json: overrides as `quantization_json` has them. No names of formats: their bytes count."""
    overrides: list[Any] = quantization_json(resolved(quantization, choice))["overrides"]
    return overrides
