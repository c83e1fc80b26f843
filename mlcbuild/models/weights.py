"""A library's parameters inside the graph: one tuple, taken apart by role and layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx

from mlcbuild.models.structure import Structure


@dataclass(frozen=True)
class Declared:
    """A parameter as the library takes it: `model.norm.weight`, or `lm_head.q_scale` where it is quantized."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    layer: int | None

    @property
    def part(self) -> str:
        """`weight`, `q_weight`, `q_scale`, `bias`: the last word of the name."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def open_vocabulary(self) -> bool:
        """Whether the first dimension is the vocabulary, which stays symbolic."""
        return self.role in ("embedding", "lm_head")


def tuple_type(declared: Sequence[Declared]) -> relax.TupleType:
    """The type of the tuple of all parameters, its vocabulary size a fresh variable."""
    vocab_size = tirx.Var("vocab_size", "int64")
    return relax.TupleType(
        [
            relax.TensorType([vocab_size, *p.shape[1:]] if p.open_vocabulary else list(p.shape), p.dtype)
            for p in declared
        ]
    )


class Weights:
    """The parameters that one function of the module was given, as relax expressions by role."""

    def __init__(self, builder: relax.BlockBuilder, declared: Sequence[Declared], params: relax.Var) -> None:
        self._builder, self._declared, self._params = builder, declared, params

    def get(self, role: str, layer: int | None = None) -> dict[str, Any]:
        """The parts of the parameter that plays `role`, by the last word of their names."""
        return {
            p.part: self._builder.emit(relax.TupleGetItem(self._params, index))
            for index, p in enumerate(self._declared)
            if p.role == role and p.layer == layer
        }

    def layer(self, layer: int) -> list[tuple[Declared, Any]]:
        """All parameters of one layer, in order."""
        return [
            (p, self._builder.emit(relax.TupleGetItem(self._params, index)))
            for index, p in enumerate(self._declared)
            if p.layer == layer
        ]


def head_role(structure: Structure) -> str:
    """The parameter that turns hidden states into logits."""
    return "embedding" if structure.tie_word_embeddings else "lm_head"
