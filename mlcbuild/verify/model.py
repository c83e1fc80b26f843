"""A model's parameters by the pieces that use them, and the beginning of each way through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import BEGINNING, EMBED, FINAL_NORM, Parameter, parameters
from mlcbuild.models.structure import Structure
from mlcbuild.runtime import tvm_runtime
from mlcbuild.verify.blocks import Blocks
from mlcbuild.verify.unquantized import Unquantized

Float32 = npt.NDArray[np.float32]
Windows = Sequence[Sequence[int]]  # token ids of each


@dataclass(frozen=True)
class Model:
    """A model's parameters by where they are used, and the kind of each layer."""

    parameters: Sequence[Parameter]
    kinds: Sequence[int]

    @property
    def layers(self) -> int:
        return len(self.kinds)

    def layer(self, number: int) -> list[Parameter]:
        return [p for p in self.parameters if p.layer == number]

    @property
    def embedding(self) -> list[Parameter]:
        return self._of(EMBED)

    @property
    def beginning(self) -> list[Parameter]:
        return self._of(BEGINNING)

    @property
    def norm(self) -> list[Parameter]:
        return self._of(FINAL_NORM)

    @property
    def head(self) -> list[Parameter]:
        """What makes logits: a matrix, for which a tied model has none of its own, and a bias where there is one."""
        return [*(self._of(("lm_head",)) or self.embedding), *self._of(("lm_head_bias",))]

    def _of(self, roles: Sequence[str]) -> list[Parameter]:
        return [p for p in self.parameters if p.role in roles]


def model_of(structure: Structure) -> Model:
    return Model(parameters(structure), structure.layer_kinds)


def widened(wanted: Sequence[Parameter], checkpoint: Unquantized) -> list[Any]:
    """What a float32 library takes for these parameters."""
    return [tvm_runtime.tensor(checkpoint.rows(each.name).reshape(each.shape)) for each in wanted]


def embedded(model: Model, blocks: Blocks, checkpoint: Unquantized, windows: Windows) -> list[Float32]:
    """The unquantized model's first hidden states of each window.

    Of its embedding, only the rows that occur are read. Raises MlcBuildError for a token that has none, and for a text
    without windows.
    """
    if not windows:
        raise MlcBuildError("the text has no document of two tokens or more: nothing to run the model on")
    (embedding,) = model.embedding
    used = np.unique(np.concatenate([np.asarray(ids, np.int64) for ids in windows]))
    wrong = used[(used < 0) | (used >= embedding.shape[0])]
    if len(wrong):
        raise MlcBuildError(f"token id {wrong[0]} is not in this model's vocabulary of {embedding.shape[0]}")
    table = [tvm_runtime.tensor(checkpoint.take(embedding.name, used.tolist()))]
    beginning = widened(model.beginning, checkpoint)
    return [blocks.begin(blocks.embed(np.searchsorted(used, ids).tolist(), table), beginning) for ids in windows]
