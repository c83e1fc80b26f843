"""Lines of an architecture's parameter list, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def choice(default: Any) -> Any:
    """A field that JSON forms leave out where it has its default: what later versions add changes no older key."""
    return dataclasses.field(default=default, metadata={"choice": True})


@dataclass(frozen=True)
class ParameterRule:
    """One line of an architecture's parameter list; `{i}` in a name stands for the layer's number.

    `convert` is how the checkpoint's tensors become the parameter (mlcbuild.merging.rearranged); `layers` those that
    have it, None for all; `dtype` what it is stored in where it is not the quantization's model dtype. `{e}` in a
    source stands for each expert, `{h}` for each head of a norm; `alternative` is what a checkpoint may have instead of
    the sources.
    """

    role: str
    name: str
    sources: tuple[str, ...]  # checkpoint tensors, joined along their first axis
    convert: tuple[str, ...] = choice(())
    layers: tuple[int, ...] | None = choice(None)
    dtype: str | None = choice(None)
    alternative: tuple[str, ...] = choice(())

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.name

    def of_layers(self, layers: Sequence[int]) -> ParameterRule:
        """The rule in a model that consists of these layers."""
        if self.layers is None:
            return self
        mine = tuple(number for number, layer in enumerate(layers) if layer in self.layers)
        return dataclasses.replace(self, layers=None if len(mine) == len(layers) else mine)
