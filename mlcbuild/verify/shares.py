"""What each kind of matrix costs a model when it alone is rounded: the KL divergence that a budget is spent by.

A text goes through the unquantized model and, layer by layer beside it, through one model for each kind, in which the
matrices of this kind are those of finished weights, and no others. In memory are a layer as float32, one kind of it
rounded, and the hidden states of all models; of the embedding the rows that occur, of the output matrix a slice. That
is a real run. What several kinds lose nearly adds up.

A kind is run in one format only, that of the weights. In the others it loses more or less as the square of the error in
its numbers does, for KL divergence is a square to begin with. Figures are rounded to three significant digits: sums may
differ between machines in their last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import Parameter
from mlcbuild.models.structure import Structure
from mlcbuild.quantization import asymmetric, group
from mlcbuild.quantization.budget import kinds
from mlcbuild.recipes.types import Quantization, Weights
from mlcbuild.runtime import tvm_runtime
from mlcbuild.verify import evaluate
from mlcbuild.verify.layers import sliced_logits, slices
from mlcbuild.verify.packed import Packed
from mlcbuild.verify.pieces import Float32, Pieces
from mlcbuild.verify.tensors import PieceParameters, Unquantized, Windows, begun, by_piece, widened

TOKENS, WINDOW = 1024, 128  # of a text, and of a document, where it has enough documents
_COMPARED = 2  # of how many tokens one is: a large vocabulary takes longer than the layers
_BLOCK = 8  # rows that are unpacked together at least (mlcbuild.verify.packed)
_ROWS = 4096  # of all matrices of a kind, whose errors in other formats are compared
_DIGITS = 3

Shares = dict[str, dict[str, float]]  # kind -> format -> nats


def some(documents: Iterable[Sequence[int]], context: int) -> list[Sequence[int]]:
    """About TOKENS tokens of a text: the beginnings of documents, the longest first, evenly chosen among equals.

    Beginnings, as models compute otherwise where the token is missing that they expect before a text. Raises
    MlcBuildError where no document is long enough for a figure.
    """
    every = [document for document in documents if len(document) > _COMPARED]
    if not every:
        raise MlcBuildError(
            f"the calibration text has no document of {_COMPARED + 1} tokens or more, and a budget is spent by what it "
            "measures on one: give the model's file another text (`calibration: {text: FILE}`)"
        )
    length = min(max(WINDOW, TOKENS // len(every)), context)
    windows = [document[:length] for document in every]
    chosen, tokens = list[int](), 0
    for size in sorted({len(each) for each in windows}, reverse=True):
        equal = [number for number, each in enumerate(windows) if len(each) == size]
        wanted = min(len(equal), -(-(TOKENS - tokens) // size))
        chosen += [equal[number * len(equal) // wanted] for number in range(wanted)]
        tokens += wanted * size
        if tokens >= TOKENS:
            break
    return [windows[number] for number in sorted(chosen)]


@dataclass(frozen=True)
class Measurement:
    """A model, a budget, what runs the model (`library` is one of float32 pieces), and its weights in one format."""

    structure: Structure
    budget: Quantization
    library: Pieces
    checkpoint: Unquantized
    rounded: Packed

    def run(self, windows: Windows, progress: Callable[[int, int], None] = lambda done, total: None) -> Shares:
        """Nats by kind and format, the first of which is that of the weights.

        Raises MlcBuildError for a text without windows, and where logits are not finite.
        """
        model = by_piece(self.structure)
        every = kinds(model.parameters, self.budget)
        hidden = {kind: self._begun(model, windows, kind) for kind in ("", *every)}
        total = model.layers + len(windows)
        for number in range(model.layers):
            hidden = self._layer(model, number, hidden)
            progress(number + 1, total)
        norm = widened(model.norm, self.checkpoint)
        normed = {kind: [self.library.normed(each, norm) for each in states] for kind, states in hidden.items()}
        nats, tokens = dict.fromkeys(every, 0.0), 0
        for at, window in enumerate(windows):
            ids, p = window[::_COMPARED], normed[""][at][::_COMPARED]
            plain = np.concatenate(list(sliced_logits(self.library, p, self.checkpoint.rows_of, model.head)))
            for kind in every:
                found = self._divergence(model, plain, normed[kind][at][::_COMPARED], kind, ids)
                nats[kind] += found * (len(ids) - 1)
            tokens += len(ids) - 1
            progress(model.layers + at + 1, total)
        ratios = {kind: self._ratios([each for each in model.parameters if each.role == kind]) for kind in every}
        return {
            kind: {name: float(f"{nats[kind] / tokens * ratio:.{_DIGITS - 1}e}") for name, ratio in of.items()}
            for kind, of in ratios.items()
        }

    def _begun(self, model: PieceParameters, windows: Windows, kind: str) -> list[Float32]:
        """What the first layer is given."""

        def take(embedding: Parameter, rows: Sequence[int]) -> Float32:
            if embedding.role == kind:
                return self._taken(embedding, rows)
            return self.checkpoint.take(embedding.name, rows)

        beginning = [
            self._rounded(each) if each.role == kind else widened([each], self.checkpoint)[0]
            for each in model.beginning
        ]
        return begun(model, self.library, take, beginning, windows)

    def _layer(
        self, model: PieceParameters, number: int, hidden: Mapping[str, list[Float32]]
    ) -> dict[str, list[Float32]]:
        """What comes out of a layer, by kind."""
        mine, found = model.layer(number), {}
        exact = widened(mine, self.checkpoint)
        for kind, states in hidden.items():
            given = [self._rounded(each) if each.role == kind else exact[at] for at, each in enumerate(mine)]
            found[kind] = [self.library.layer(window, given, model.kinds[number]) for window in states]
            del given  # before the next kind is made
        return found

    def _divergence(
        self, model: PieceParameters, plain: Float32, normed: Float32, kind: str, ids: Sequence[int]
    ) -> float:
        """From the unquantized model's logits, of what the head is given; its rows are rounded where it is the kind."""

        def rows(each: Parameter, first: int, last: int) -> Float32:
            source = self.rounded.rows if each.role == kind else self.checkpoint.rows_of
            return source(each, first, last)

        def logits(ids: Sequence[int]) -> Iterable[Float32]:
            return sliced_logits(self.library, normed, rows, model.head)

        return evaluate.compare(logits, lambda ids: [plain], [ids]).kl

    def _rounded(self, parameter: Parameter) -> Any:
        found = tvm_runtime.aligned_empty(parameter.shape, np.float32)
        rows = found.reshape(-1, parameter.shape[-1])
        for first, last in slices(parameter):
            rows[first:last] = self.rounded.rows(parameter, first, last)
        return tvm_runtime.tensor(found)

    def _taken(self, parameter: Parameter, rows: Sequence[int]) -> Float32:
        """These rows of a matrix [N, K], in order: no others are unpacked but those around them."""
        wanted = np.asarray(rows)
        found = tvm_runtime.aligned_empty((len(rows), parameter.shape[-1]), np.float32)
        for first in np.unique(wanted // _BLOCK * _BLOCK).tolist():
            here = slice(*np.searchsorted(wanted, (first, first + _BLOCK)))
            block = self.rounded.rows(parameter, first, min(first + _BLOCK, parameter.shape[0]))
            found[here] = block[wanted[here] - first]
        return found

    def _ratios(self, parameters: Sequence[Parameter]) -> Mapping[str, float]:
        """By format, the squared error in some rows of the matrices, relative to that in the first format."""
        errors = dict.fromkeys((name for name, _ in self.budget.formats), 0.0)
        step = max(1, sum(prod(each.shape[:-1]) for each in parameters) // _ROWS)
        for each in parameters:
            rows = self.checkpoint.take(each.name, range(0, prod(each.shape[:-1]), step))
            for name, weights in self.budget.formats:
                if weights is not None:
                    off = _nearest(rows, weights, self.budget.model_dtype) - rows
                    errors[name] += float(np.square(off, dtype=np.float64).sum())
        first = errors[self.budget.formats[0][0]]
        return {name: error / first if first else 0.0 for name, error in errors.items()}


def _nearest(rows: Float32, weights: Weights, dtype: str) -> Float32:
    """Rows [N, K] as the format's own rounding leaves them."""
    if weights.symmetric:
        return group.decode(group.encode(rows, "float32", weights, dtype), rows.shape[1], weights, dtype)
    return asymmetric.decode(asymmetric.encode(rows, "float32", weights), rows.shape[1], weights)
