"""Quantizations that are budgets, as steps know them (mlcbuild.quantization.budget), and which models they are for."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlcbuild.engine.graph import Input
from mlcbuild.errors import MlcBuildError
from mlcbuild.planning.shapes import Shape
from mlcbuild.recipes.types import CHOICE, Quantization

MEASURED = ("calibrated", "gptq")  # roundings for which the calibration text goes through the model


def first(quantization: Quantization) -> Quantization:
    """All of a model in the first of a budget's formats, as if a file said so: what each kind of matrix loses in it."""
    name = f"{quantization.formats[0][0]}@{quantization.rounding}"  # which no file can have
    return dataclasses.replace(quantization, name=name, format="", formats=(), bits_per_weight=None)


def check(quantization: Quantization, shape: Shape) -> None:
    """Raises MlcBuildError where the model cannot be measured as the quantization wants it."""
    if quantization.formats:
        what, instead = "a budget", f"one of its formats, such as {quantization.formats[0][0]}"
    elif quantization.rounding in MEASURED:
        every = (quantization.weights, *(weights for _, weights in quantization.overrides))
        searched = any(weights is not None and weights.symmetric for weights in every)
        what = f"rounding `{quantization.rounding}`"
        instead = f"the same quantization without it{', or with `rounding: mse`' if searched else ''}"
    else:
        return
    if shape.blocks is None:
        name = shape.fields["architecture"]
        raise MlcBuildError(f"{what} runs a model layer by layer, and {name} cannot be run so: choose {instead}")
    if quantization.formats and shape.fields.get("embedding") is not None:
        raise MlcBuildError(
            "a budget is spent by what the probabilities of the next token lose, and this model gives vectors of "
            f"texts: choose {instead}"
        )


def spending(quantization: Quantization) -> dict[str, Any]:
    """The fields of the step `allocate` that are the budget's."""
    formats = [[name, weights and dataclasses.asdict(weights)] for name, weights in quantization.formats]
    return {"formats": formats, "bits_per_weight": quantization.bits_per_weight}


def chosen(budget: str | None) -> tuple[Input, ...]:
    """What depends on a budget's choice, and not on why it was made; nothing for other quantizations."""
    return (Input("budget", step=budget, select=(CHOICE,)),) if budget else ()
