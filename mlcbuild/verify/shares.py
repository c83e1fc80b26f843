"""What each kind of matrix costs a model when it alone is rounded: the KL divergence that a budget is spent by.

A text goes through the unquantized model and, layer by layer beside it, through one model for each kind, in which the
matrices of this kind are those of finished weights, and no others. In memory are a layer as float32, one kind of it
rounded, and the hidden states of all models. That is a real run. What several kinds lose nearly adds up.

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

from mlcbuild.models.parameters import Parameter
from mlcbuild.models.structure import Structure
from mlcbuild.quantization import asymmetric, group
from mlcbuild.quantization.budget import kinds
from mlcbuild.recipes.types import Quantization, Weights
from mlcbuild.runtime import tvm_runtime
from mlcbuild.verify import evaluate
from mlcbuild.verify.layers import sliced_logits
from mlcbuild.verify.packed import Packed
from mlcbuild.verify.pieces import Float32, Pieces
from mlcbuild.verify.tensors import PieceParameters, Unquantized, Windows, by_piece, embedded, widened

TOKENS, WINDOW = 1024, 128  # of a text, and of a document, where it has enough documents
_COMPARED = 2  # of how many tokens one is: a large vocabulary takes longer than the layers
_ROWS = 4096  # of all matrices of a kind, whose errors in other formats are compared
_DIGITS = 3

Shares = dict[str, dict[str, float]]  # kind -> format -> nats


def some(documents: Iterable[Sequence[int]], context: int) -> list[Sequence[int]]:
    """About TOKENS tokens of a text: the beginnings of documents, evenly chosen.

    Beginnings, as models compute otherwise where the token is missing that they expect before a text.
    """
    every = [document for document in documents if len(document) > 1]
    length = min(max(WINDOW, TOKENS // max(len(every), 1)), context)
    long = [each for each in every if len(each) >= length] or every
    wanted = min(len(long), max(TOKENS // length, 1))
    return [long[number * len(long) // wanted][:length] for number in range(wanted)]


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
            mine = model.layer(number)
            exact = widened(mine, self.checkpoint)
            for kind, states in hidden.items():
                given = [self._rounded(each) if each.role == kind else exact[at] for at, each in enumerate(mine)]
                hidden[kind] = [self.library.layer(window, given, model.kinds[number]) for window in states]
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
        """What the first layer is given; of the embedding, only rows that occur are read where it is not rounded."""
        (table,) = model.embedding
        if kind not in (each.role for each in (table, *model.beginning)):
            return embedded(model, self.library, self.checkpoint, windows)
        embedding, *beginning = [
            self._rounded(each) if each.role == kind else widened([each], self.checkpoint)[0]
            for each in (table, *model.beginning)
        ]
        return [self.library.begin(self.library.embed(ids, [embedding]), beginning) for ids in windows]

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
        rows = prod(parameter.shape[:-1])
        each = parameter.shape[-2]  # rows of an expert
        values = [self.rounded.rows(parameter, first, first + each) for first in range(0, rows, each)]
        return tvm_runtime.tensor(np.concatenate(values).reshape(parameter.shape))

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
