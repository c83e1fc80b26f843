"""A library's parameters inside the graph: one tuple, taken apart by role and layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx

from mlcbuild.models.structure import Structure
from mlcbuild.recipes.types import Weights as Packing


@dataclass(frozen=True)
class Declared:
    """A parameter as the library takes it: `model.norm.weight`, or `lm_head.q_scale` where it is quantized.

    `packing` is the format of the parameter that this is a part of, None where it is not quantized. `rows_axis` is the
    axis along which that parameter's rows N lie, None where a part has none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    layer: int | None
    packing: Packing | None = None
    rows_axis: int | None = 0
    users: tuple[int, ...] = ()  # later layers that have it, too

    def of(self, layer: int) -> bool:
        """Whether a layer has it."""
        return self.layer == layer or layer in self.users

    @property
    def part(self) -> str:
        """`weight`, `q_weight`, `q_scale`, `bias`: the last word of the name."""
        return self.name.rsplit(".", 1)[-1]

    def shape_for(self, vocab_size: Any) -> list[Any]:
        """The shape with `vocab_size` where the vocabulary is, which stays symbolic."""
        shape: list[Any] = list(self.shape)
        if self.role in ("embedding", "lm_head", "lm_head_bias", "lm_head_scale") and self.rows_axis is not None:
            shape[self.rows_axis] = vocab_size
        return shape


@dataclass(frozen=True)
class Weight:
    """One parameter inside a function: its parts by the last words of their names, as relax expressions.

    `rows` is N of a matrix [N, K], which may be symbolic.
    """

    parts: Mapping[str, Any]
    packing: Packing | None
    rows: Any

    @property
    def plain(self) -> Any:
        """The only part of a parameter that is not quantized."""
        (part,) = self.parts.values()
        return part


def weight_of(declared: Sequence[Declared], expressions: Sequence[Any]) -> Weight:
    """The parameter of which `declared` are the parts, given as `expressions`."""
    # Words may hold several rows (AWQ's do), so scales say how many there are: they come after the words.
    rows = [e.ty.shape[p.rows_axis] for p, e in zip(declared, expressions, strict=True) if p.rows_axis is not None]
    parts = {p.part: e for p, e in zip(declared, expressions, strict=True)}
    return Weight(parts, declared[0].packing, rows[-1])


class Given:
    """The parameters that a function takes one by one, as relax expressions by role: `given(role)`, `role in given`."""

    def __init__(self, declared: Sequence[Declared], expressions: Sequence[Any]) -> None:
        self._pairs: dict[str, list[tuple[Declared, Any]]] = {}
        for each, expression in zip(declared, expressions, strict=True):
            self._pairs.setdefault(each.role, []).append((each, expression))

    def __call__(self, role: str) -> Weight:
        pairs = self._pairs[role]
        return weight_of([p for p, _ in pairs], [expression for _, expression in pairs])

    def __contains__(self, role: str) -> bool:
        return role in self._pairs

    def also(self, declared: Declared, expression: Any) -> Given:
        """These parameters and one more."""
        more = Given([declared], [expression])
        more._pairs = {**self._pairs, **more._pairs}
        return more


class Weights:
    """The parameters that one function of the module was given, as relax expressions by role.

    `params` is an opaque object to the function, which checks those that it takes out of it: a function's type with a
    thousand tensors in it would be gone through by every pass, once for each function.
    """

    def __init__(self, builder: relax.BlockBuilder, declared: Sequence[Declared], params: relax.Var) -> None:
        self._builder, self._declared, self._params = builder, declared, params
        self._vocab_size = tirx.Var("vocab_size", "int64")

    def __contains__(self, role: str) -> bool:
        return any(p.role == role and p.layer is None for p in self._declared)

    def __call__(self, role: str) -> Weight:
        """The parameter outside the layers that plays `role`."""
        mine = [(index, p) for index, p in enumerate(self._declared) if p.role == role and p.layer is None]
        return weight_of([p for _, p in mine], [self._take(index) for index, _ in mine])

    def layer(self, layer: int) -> list[Any]:
        """All parameters of one layer, in order."""
        return [self._take(index) for index, p in enumerate(self._declared) if p.of(layer)]

    def _take(self, index: int) -> Any:
        declared = self._declared[index]
        item = relax.call_pure_packed(
            "vm.builtin.tuple_getitem", self._params, relax.prim_value(index), ty_args=relax.AnyType()
        )
        tensor = relax.TensorType(declared.shape_for(self._vocab_size), declared.dtype)
        return self._builder.match_cast(self._builder.emit(item), tensor)


def head_role(structure: Structure) -> str:
    """The parameter that turns hidden states into logits."""
    return "lm_head" if "lm_head" in structure.roles() else "embedding"
