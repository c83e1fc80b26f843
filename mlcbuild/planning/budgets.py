"""Quantizations that are budgets, as steps know them (mlcbuild.quantization.budget)."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlcbuild.engine.graph import Input
from mlcbuild.recipes.types import Quantization


def first(quantization: Quantization) -> Quantization:
    """All of a model in the first of a budget's formats, as if a file said so: what each kind of matrix loses in it."""
    name = f"{quantization.formats[0][0]}@{quantization.rounding}"  # which no file can have
    return dataclasses.replace(quantization, name=name, format="", formats=(), bits_per_weight=None)


def spending(quantization: Quantization) -> dict[str, Any]:
    """The fields of the step `allocate` that are the budget's."""
    formats = [[name, weights and dataclasses.asdict(weights)] for name, weights in quantization.formats]
    return {"formats": formats, "bits_per_weight": quantization.bits_per_weight}


def chosen(budget: str | None) -> tuple[Input, ...]:
    """What depends on a budget's choice, and not on why it was made; nothing for other quantizations."""
    return (Input("budget", step=budget, select=("choice.json",)),) if budget else ()
