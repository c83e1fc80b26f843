"""Weights rounded layer by layer, each to what runs through what is rounded already.

The matrices of a layer are done in the order in which they are used: a text goes through the layers before and the
layer's own matrices that are done, and what reaches the next matrix decides how that is rounded
(mlcbuild.quantization.feedback). In memory are a layer as float32, and what runs through one matrix.

A tied embedding comes first, when nothing is rounded yet: by what the unquantized model gives the head, where its rows
are the matrix, and by its own numbers, which are the rows that are looked up. An expert is rounded by the tokens that
chose it, and by some of all experts' tokens, which decide where few or none did.
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
from mlcbuild.quantization.correction import moved
from mlcbuild.quantization.feedback import Gram, Kernels
from mlcbuild.quantization.packing import Packed
from mlcbuild.quantization.schemes import has_feedback, packed
from mlcbuild.recipes.types import Quantization, Weights
from mlcbuild.runtime import tvm_runtime
from mlcbuild.verify.pieces import Float32, Pieces
from mlcbuild.verify.tensors import PieceParameters, Unquantized, Windows, by_piece, embedded, widened

# The part of the inputs' mean square that is added to each input's. 10 % was better than 1 % on real models.
_DAMPING = 0.1
# The first tokens of windows count this much in what reaches a layer's matrices, against all others together.
_FIRST = 3.0
# An error in a row of a tied embedding counts this much as an input, against all that it counts as an output.
_LOOKED_UP = 0.3
_BORROWED = 64  # tokens of all experts that count for each

Inputs = Sequence[Float32]  # of one matrix, for a window: rows [tokens, K]; of experts, then which were chosen
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
        hidden = embedded(model, self.library, self.checkpoint, windows)
        (table,) = model.embedding
        head = next(iter(model.head), None)
        values, weights = self._values(table), packed(table, self.quantization)
        total = model.layers * (2 if head is table else 1)
        if weights is not None and has_feedback(weights):
            gram = None
            if head is table:
                gram = self._reaching_the_head(hidden, weights, lambda done: progress(done, total))
            done, values = self._table(values, weights, gram)
            save(table.name, done)
        elif weights is None:
            values = self._cast(table, values)
        exact, hidden = hidden, self._looked_up(values, windows)
        del values
        for number in range(model.layers):
            exact, hidden = self._layer(number, exact, hidden, save)
            progress(total - model.layers + number + 1, total)
        weights = packed(head, self.quantization) if head is not None else None
        if head is not None and head is not table and weights is not None and has_feedback(weights):
            norm = [self._tensor(self._cast(each, self._values(each))) for each in model.norm]
            theirs = widened(model.norm, self.checkpoint)
            wanted, normed = ([self.library.normed(x, by) for x in xs] for xs, by in ((exact, theirs), (hidden, norm)))
            halves = self._halves(head, weights, [(x,) for x in normed], [(x,) for x in wanted])
            done, _ = self._matrix(self._values(head), weights, halves)
            save(head.name, done)

    def _reaching_the_head(self, hidden: list[Float32], weights: Weights, progress: Callable[[int], None]) -> Gram:
        """What the unquantized model multiplies the head with."""
        model = self.model
        for number in range(model.layers):
            given = widened(model.layer(number), self.checkpoint)
            hidden = [self.library.layer(each, given, model.kinds[number]) for each in hidden]
            del given  # before the next layer is read
            progress(number + 1)
        norm = widened(model.norm, self.checkpoint)
        gram = Gram(self.kernels, self.structure.hidden_size, weights)
        for each in hidden:
            gram.add(self.library.normed(each, norm))
        self._check(gram.sums, "the head")
        return gram

    def _table(self, values: Float32, weights: Weights, gram: Gram | None) -> tuple[Packed, Float32]:
        """The embedding, whose errors count alike in all columns where it is not the head as well."""
        if gram is None:
            return self._alone(values, weights)
        by = feedback.metric(self.kernels, gram.sums, weights, _LOOKED_UP)
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
        self, number: int, exact: list[Float32], hidden: list[Float32], save: Save
    ) -> tuple[list[Float32], list[Float32]]:
        """What comes out of a layer of the unquantized model, and of this one once its matrices are rounded."""
        mine, kind = self.model.layer(number), self.model.kinds[number]
        formats = {each.name: packed(each, self.quantization) for each in mine}
        values = {each.name: self._values(each) for each in mine}
        given = [self._tensor(values[each.name]) for each in mine]
        theirs = [self._run(window, given, kind, mine) for window in exact]
        values |= {each.name: self._cast(each, values[each.name]) for each in mine if formats[each.name] is None}
        halves: dict[str, tuple[Gram, Gram]] = {}  # also of matrices that will be given the same
        for each in mine:
            name, weights = each.name, formats[each.name]
            if not each.is_matrix or weights is None or not has_feedback(weights):
                continue
            if name not in halves:
                given = [self._tensor(values[other.name]) for other in mine]
                inputs = self._first_counted([self._run(window, given, kind, mine)[1][name] for window in hidden])
            if len(each.shape) == 3:
                done, values[name] = self._experts(each, values[name], weights, inputs)
            else:
                if name not in halves:
                    found = self._halves(each, weights, inputs, self._first_counted([of[name] for _, of in theirs]))
                    _, some = self._run(hidden[0], given, kind, mine)
                    alike = (other for other, (x, *_) in some.items() if np.array_equal(x, some[name][0]))
                    halves = {other: found for other in alike if formats[other] == weights}
                done, values[name] = self._matrix(values[name], weights, halves[name])
            save(name, done)
        given = [self._tensor(values[each.name]) for each in mine]
        return [out for out, _ in theirs], [self.library.layer(window, given, kind) for window in hidden]

    def _run(
        self, window: Float32, given: list[Any], kind: int, mine: Sequence[Parameter]
    ) -> tuple[Float32, dict[str, Inputs]]:
        """What comes out of a layer, and what each of its matrices is multiplied with, by name."""
        pieces = [iter(piece) for piece in self.library.layer_with_inputs(window, given, kind)]
        out, *inputs = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        following = iter(inputs)
        return out, {each.name: [next(following) for _ in each.shape[1:]] for each in mine if each.is_matrix}

    def _first_counted(self, inputs: Sequence[Inputs]) -> Sequence[Inputs]:
        """The same, with the first token of each window grown, so that all squares of first ones count `_FIRST`."""
        tokens = [len(chosen[0] if chosen else rows) for rows, *chosen in inputs]
        factor = np.float32(np.sqrt(max(1, _FIRST * (sum(tokens) - len(tokens)) / len(tokens))))
        for (rows, *_), count in zip(inputs, tokens, strict=True):
            rows[: len(rows) // count] *= factor
        return inputs

    def _halves(
        self, parameter: Parameter, weights: Weights, inputs: Sequence[Inputs], wanted: Sequence[Inputs]
    ) -> tuple[Gram, Gram]:
        """Of every other window each."""
        even, odd = (Gram(self.kernels, parameter.shape[1], weights) for _ in range(2))
        for number, ((z, *_), (x, *_)) in enumerate(zip(inputs, wanted, strict=True)):
            (odd if number % 2 else even).add(z, x)
        self._check(even.sums + odd.sums, parameter.name)
        return even, odd

    def _matrix(self, values: Float32, weights: Weights, halves: tuple[Gram, Gram]) -> tuple[Packed, Float32]:
        by = feedback.metric(self.kernels, halves[0].sums + halves[1].sums, weights, _DAMPING)
        wanted = moved(self.kernels, values, halves)
        return feedback.rounded(self.kernels, wanted, by, weights, self.quantization.model_dtype)

    def _experts(
        self, parameter: Parameter, values: Float32, weights: Weights, inputs: Sequence[Inputs]
    ) -> tuple[Packed, Float32]:
        rows, chosen = (np.concatenate(each) for each in zip(*inputs, strict=True))
        per_row = chosen.size // len(rows)
        every = Gram(self.kernels, values.shape[-1], weights)
        every.add(rows)
        self._check(every.sums, parameter.name)
        shared = every.sums * np.float32(_BORROWED / every.tokens)
        done = []
        for expert, matrix in enumerate(values):
            mine = Gram(self.kernels, values.shape[-1], weights)
            mine.add(rows[np.flatnonzero(chosen.reshape(-1) == expert) // per_row])
            by = feedback.metric(self.kernels, mine.sums + shared, weights, _DAMPING)
            done.append(feedback.rounded(self.kernels, matrix, by, weights, self.quantization.model_dtype))
        words, scales = (np.concatenate([getattr(each, name) for each, _ in done]) for name in ("words", "scales"))
        return Packed(words, scales), np.stack([numbers for _, numbers in done])

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

    def _check(self, sums: Float32, where: str) -> None:
        if not np.isfinite(sums).all():
            raise MlcBuildError(f"{where}: what runs through the model is NaN or Inf; the checkpoint is damaged")
