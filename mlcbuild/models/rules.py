"""Lines of an architecture's parameter list, as plain data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
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
    source stands for each expert, `{h}` for each head of a norm; `numbers` are other letters, each with what it stands
    for in every layer. Layers in which a parameter has one name have it together. `alternative` is what a checkpoint
    may have instead of the sources.
    """

    role: str
    name: str
    sources: tuple[str, ...]  # checkpoint tensors, joined along their first axis
    convert: tuple[str, ...] = choice(())
    layers: tuple[int, ...] | None = choice(None)
    dtype: str | None = choice(None)
    alternative: tuple[str, ...] = choice(())
    numbers: tuple[tuple[str, tuple[int | str, ...]], ...] = choice(())
    times: float = choice(1.0)  # what `convert: times` multiplies with

    @property
    def per_layer(self) -> bool:
        return "{" in self.name

    def named(self, text: str, layer: int | None) -> str:
        """A name with a layer's numbers in it, but that of the layer itself."""
        for letter, values in self.numbers:
            text = text if layer is None else text.replace(f"{{{letter}}}", str(values[layer]))
        return text

    def of_layers(self, layers: Sequence[int]) -> ParameterRule:
        """The rule in a model that consists of these layers."""
        numbers = tuple((letter, tuple(values[layer] for layer in layers)) for letter, values in self.numbers)
        if self.layers is None:
            return dataclasses.replace(self, numbers=numbers) if numbers else self
        mine = tuple(number for number, layer in enumerate(layers) if layer in self.layers)
        return dataclasses.replace(self, layers=None if len(mine) == len(layers) else mine, numbers=numbers)


def without_defaults(data: Any) -> dict[str, Any]:
    """A dataclass's fields, but choices at their default."""
    return {
        name: value
        for name, default, always in _fields_of(data.__class__)
        if (value := getattr(data, name)) != default or always
    }


@functools.cache
def _fields_of(kind: Any) -> list[tuple[str, Any, bool]]:
    """Name and default of a dataclass's fields, and whether they are told even where they have it."""
    return [(field.name, field.default, "choice" not in field.metadata) for field in dataclasses.fields(kind)]


def library_rule(rule: ParameterRule) -> list[Any]:
    """What a library depends on of a rule."""
    more = {name: value for name in ("layers", "dtype", "numbers") if (value := getattr(rule, name))}
    return [rule.role, rule.name, more] if more else [rule.role, rule.name]


def rule_from_json(data: Mapping[str, Any]) -> ParameterRule:
    """The inverse of `without_defaults`."""
    numbers = tuple((letter, tuple(values)) for letter, values in data.get("numbers", ()))
    return ParameterRule(**tuples({**data, "numbers": numbers}))


def tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with tuples where JSON has lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
