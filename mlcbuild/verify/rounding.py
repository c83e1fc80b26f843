"""Weights rounded layer by layer, each to what runs through the layers that are rounded already.

A text goes through the model twice, side by side: x through the unquantized layers, z through those that are rounded.
The matrices of a layer are done in the order in which they are used, what the first ones do to z included. Each is
moved to where it makes of z most nearly what the unquantized one makes of x, and rounded by how z is distributed
(mlcbuild.quantization.feedback). In memory are a layer as float32 and what runs through it.

A tied embedding comes first, when there is no z yet: it is rounded by how x reaches the head, where its rows are the
matrix, and by its own numbers, which are the rows that are looked up. An expert is rounded by the tokens that chose it,
and by some of all experts' tokens, which decide where few or none did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import Parameter
from mlcbuild.models.structure import Structure
from mlcbuild.quantization import asymmetric, feedback, floats, group, search
from mlcbuild.quantization.feedback import Gram, Kernels
from mlcbuild.quantization.packing import Packed
from mlcbuild.quantization.schemes import has_feedback, packed
from mlcbuild.recipes.types import Quantization, Weights
from mlcbuild.runtime import tvm_runtime
from mlcbuild.verify.pieces import Float32, Pieces
from mlcbuild.verify.tensors import PieceParameters, Unquantized, Windows, by_piece, embedded, widened

# Parts of the mean square of all inputs that are added to each. Of 1 % to 30 %, 10 % was best on real models.
_DAMPING = 0.1
# An error in a row of a tied embedding counts this much as an input, against all that it counts as an output.
_LOOKED_UP = 0.3
_BORROWED = 64  # tokens of all experts that count for each

Inputs = list[Float32]  # of one matrix, for a window: rows [tokens, K]; of experts, then which were chosen
Save = Callable[[str, Packed], None]


@dataclass(frozen=True)
class Rounding:
    """The model, the format, and all that is needed to round it. `library` is one of float32 pieces."""

    structure: Structure
    quantization: Quantization
    library: Pieces
    checkpoint: Unquantized
    kernels: Kernels

    @cached_property
    def model(self) -> PieceParameters:
        return by_piece(self.structure)

    def run(
        self, windows: Windows, save: Save, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Hand every rounded parameter to `save`, by name.

        Raises MlcBuildError for a text without windows, and where what runs through the model is not finite.
        """
        model = self.model
        total = 2 * model.layers
        x = embedded(model, self.library, self.checkpoint, windows)
        (table,) = model.embedding
        values = self.checkpoint.rows(table.name)
        weights = packed(table, self.quantization)
        if weights is not None and has_feedback(weights):
            gram = None
            if model.head[0] is table:
                gram = self._reaching_the_head(x, weights, lambda done: progress(done, total))
            done, values = self._table(values, weights, gram)
            save(table.name, done)
        elif weights is None:
            values = self._cast(table, values)
        z = self._looked_up(values, windows)
        for number in range(model.layers):
            x, z, found = self._layer(number, x, z)
            for name, each in found.items():
                save(name, each)
            progress(model.layers + number + 1, total)
        head = model.head[0]
        weights = packed(head, self.quantization)
        if head is not table and weights is not None and has_feedback(weights):
            save(head.name, self._head(head, weights, x, z))

    def _reaching_the_head(self, hidden: list[Float32], weights: Weights, progress: Callable[[int], None]) -> Gram:
        """What the unquantized model multiplies the head with."""
        model = self.model
        for number in range(model.layers):
            given = widened(model.layer(number), self.checkpoint)
            hidden = [self.library.layer(each, given, model.kinds[number]) for each in hidden]
            progress(number + 1)
        norm = widened(model.norm, self.checkpoint)
        gram = Gram(self.kernels, self.structure.hidden_size, weights)
        for each in hidden:
            gram.add(self.library.normed(each, norm))
        self._check(gram, "the head")
        return gram

    def _table(self, values: Float32, weights: Weights, gram: Gram | None) -> tuple[Packed, Float32]:
        """The embedding, whose errors count alike in all columns where it is not the head as well."""
        if gram is None:
            return self._alone(values, weights)
        by = feedback.metric(self.kernels, gram.own, weights, _LOOKED_UP)
        return feedback.rounded(self.kernels, values, by, weights, self.quantization.model_dtype)

    def _alone(self, values: Float32, weights: Weights) -> tuple[Packed, Float32]:
        dtype, k = self.quantization.model_dtype, values.shape[1]
        if weights.symmetric:
            done = search.encode(values, "float32", weights, dtype)
            return done, group.decode(done, k, weights, dtype)
        done = asymmetric.encode(values, "float32", weights)
        return done, asymmetric.decode(done, k, weights)

    def _looked_up(self, table: Float32, windows: Windows) -> list[Float32]:
        beginning = [self._tensor(self._cast(each, self._values(each))) for each in self.model.beginning]
        given = [self._tensor(table)]
        return [self.library.begin(self.library.embed(ids, given), beginning) for ids in windows]

    def _layer(
        self, number: int, x: list[Float32], z: list[Float32]
    ) -> tuple[list[Float32], list[Float32], dict[str, Packed]]:
        """What comes out of both layers, and the layer's rounded parameters."""
        mine, kind = self.model.layer(number), self.model.kinds[number]
        matrices = [each for each in mine if each.is_matrix]
        following, wanted = self._through(x, widened(mine, self.checkpoint), kind, matrices)
        formats = {each.name: packed(each, self.quantization) for each in mine}
        values = {each.name: self._values(each) for each in mine}
        values |= {each.name: self._cast(each, values[each.name]) for each in mine if formats[each.name] is None}
        found: dict[str, Packed] = {}
        for at, each in enumerate(matrices):
            weights = formats[each.name]
            if weights is None or not has_feedback(weights):
                continue
            _, inputs = self._through(z, [self._tensor(values[p.name]) for p in mine], kind, matrices, only=at)
            solve = self._experts if len(each.shape) == 3 else self._matrix
            found[each.name], values[each.name] = solve(
                each, values[each.name], weights, [window[0] for window in inputs], [window[at] for window in wanted]
            )
        given = [self._tensor(values[p.name]) for p in mine]
        return following, [self.library.layer(hidden, given, kind) for hidden in z], found

    def _through(
        self,
        hidden: Sequence[Float32],
        given: list[Any],
        kind: int,
        matrices: Sequence[Parameter],
        only: int | None = None,
    ) -> tuple[list[Float32], list[list[Inputs]]]:
        """The outputs of a layer, and by window the inputs of its matrices, or of one of them."""
        outs, inputs = [], []
        for window in hidden:
            pieces = list(self.library.layer_with_inputs(window, given, kind))
            out, *rest = (np.concatenate(each) for each in zip(*pieces, strict=True))
            arrays = iter(rest)
            taken = [[next(arrays) for _ in range(len(each.shape) - 1)] for each in matrices]
            outs.append(out)
            inputs.append(taken if only is None else [taken[only]])
        return outs, inputs

    def _matrix(
        self, parameter: Parameter, values: Float32, weights: Weights, z: list[Inputs], x: list[Inputs]
    ) -> tuple[Packed, Float32]:
        gram = Gram(self.kernels, values.shape[1], weights)
        for (ours,), (theirs,) in zip(z, x, strict=True):
            gram.add(ours, theirs)
        self._check(gram, parameter.name)
        by = feedback.metric(self.kernels, gram.own, weights, _DAMPING)
        wanted = feedback.moved(self.kernels, values, by, gram)
        return feedback.rounded(self.kernels, wanted, by, weights, self.quantization.model_dtype)

    def _experts(
        self, parameter: Parameter, values: Float32, weights: Weights, z: list[Inputs], x: list[Inputs]
    ) -> tuple[Packed, Float32]:
        """Both ways may have chosen other experts, so these are not moved, only rounded."""
        rows = np.concatenate([ours for ours, _ in z])
        chosen = np.concatenate([experts for _, experts in z]).astype(np.int64)
        per_row = chosen.size // len(rows)
        every = Gram(self.kernels, values.shape[-1], weights)
        every.add(rows)
        self._check(every, parameter.name)
        shared = every.own * np.float32(_BORROWED / max(every.tokens, 1))
        done = []
        for expert, matrix in enumerate(values):
            mine = Gram(self.kernels, values.shape[-1], weights)
            mine.add(rows[np.flatnonzero(chosen.reshape(-1) == expert) // per_row])
            by = feedback.metric(self.kernels, mine.own + shared, weights, _DAMPING)
            done.append(feedback.rounded(self.kernels, matrix, by, weights, self.quantization.model_dtype))
        words, scales = (np.concatenate([getattr(each, name) for each, _ in done]) for name in ("words", "scales"))
        return Packed(words, scales), np.stack([numbers for _, numbers in done])

    def _head(self, head: Parameter, weights: Weights, x: list[Float32], z: list[Float32]) -> Packed:
        norm = widened(self.model.norm, self.checkpoint)
        rounded_norm = [self._tensor(self._cast(each, self._values(each))) for each in self.model.norm]
        wanted = [[self.library.normed(each, norm)] for each in x]
        given = [[self.library.normed(each, rounded_norm)] for each in z]
        done, _ = self._matrix(head, self._values(head), weights, given, wanted)
        return done

    def _values(self, parameter: Parameter) -> Float32:
        return self.checkpoint.rows(parameter.name).reshape(parameter.shape)

    def _cast(self, parameter: Parameter, values: Float32) -> Float32:
        """As they are stored where they are not packed."""
        dtype = parameter.dtype or self.quantization.model_dtype
        return floats.widen(floats.cast(values, "float32", dtype), dtype)

    def _tensor(self, values: Float32) -> Any:
        aligned = tvm_runtime.aligned_empty(values.shape, np.float32)
        aligned[:] = values
        return tvm_runtime.tensor(aligned)

    def _check(self, gram: Gram, where: str) -> None:
        if not np.isfinite(gram.own).all():
            raise MlcBuildError(f"{where}: what runs through the model is NaN or Inf; the checkpoint is damaged")
