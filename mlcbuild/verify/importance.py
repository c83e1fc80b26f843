"""How much each input column of each matrix counts: the mean square of what runs through it, over a text.

The squared error that a wrong weight makes in a layer's output is weighted by it. The text goes through the unquantized
model layer by layer, in the memory of one layer. Figures are rounded to three significant digits in binary: the last
bits of a sum, which may differ between machines, then seldom show.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import Parameter
from mlcbuild.models.structure import Structure
from mlcbuild.verify.pieces import Float32, Pieces
from mlcbuild.verify.tensors import Unquantized, Windows, by_piece, embedded, widened

Float64 = npt.NDArray[np.float64]

_BITS = 10


def importance(
    structure: Structure,
    library: Pieces,
    checkpoint: Unquantized,
    windows: Windows,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Float32]:
    """By parameter name, `[K in]`: for every matrix of a layer and for the head, the tied embedding perhaps.

    Of experts, `[experts, K in]`: what runs through each, which is nothing where no token chose it.
    Raises MlcBuildError for a text without windows, and where hidden states are not finite, naming the layer.
    """
    model = by_piece(structure)
    tokens = sum(len(ids) for ids in windows)
    hidden = embedded(model, library, checkpoint, windows)
    found: dict[str, Float32] = {}
    for number in range(model.layers):
        mine = model.layer(number)
        given = widened(mine, checkpoint)
        matrices = [each for each in mine if each.is_matrix]
        sums = [_Sum(each) for each in matrices]
        following = []
        for window in hidden:
            pieces = []
            for out, *inputs in library.layer_with_inputs(window, given, model.kinds[number]):
                pieces.append(out)
                given_inputs = iter(inputs)
                for total in sums:
                    total.add(*(next(given_inputs) for _ in range(total.inputs)))
            following.append(np.concatenate(pieces))
        hidden = following
        if not all(np.isfinite(total.squares).all() for total in sums):
            raise MlcBuildError(f"layer {number}: what runs through the model is NaN or Inf; the checkpoint is damaged")
        found |= {each.name: _rounded(total.mean()) for each, total in zip(matrices, sums, strict=True)}
        del given  # before the next layer is read
        progress(number + 1, model.layers)
    for head in model.head[:1]:
        norm = widened(model.norm, checkpoint)
        squares = sum(np.square(library.normed(window, norm), dtype=np.float64).sum(axis=0) for window in hidden)
        found[head.name] = _rounded(squares / tokens)
    return found


class _Sum:
    """The squares of what a matrix [N, K], or experts [experts, N, K], was multiplied with, and how many rows it was.

    inputs: how many arrays `add` takes: x [tokens, K]; for experts, also what each token chose, [tokens, choices], and
    x may have a row for every choice.
    """

    def __init__(self, parameter: Parameter) -> None:
        *experts, _, columns = parameter.shape
        self.inputs = 1 + len(experts)
        self.squares: Float64 = np.zeros((*experts, columns))
        self.rows: Float64 = np.zeros((*experts, 1))

    def add(self, x: Float32, chosen: Float32 | None = None) -> None:
        squares = np.square(x, dtype=np.float64)
        if chosen is None:
            self.squares += squares.sum(axis=0)
            self.rows += len(x)
            return
        pairs = chosen.reshape(-1).astype(np.int64)
        per_row = len(pairs) // len(x)
        for expert in np.unique(pairs):
            mine = np.flatnonzero(pairs == expert)
            self.squares[expert] += squares[mine // per_row].sum(axis=0)
            self.rows[expert] += len(mine)

    def mean(self) -> Float64:
        return self.squares / np.maximum(self.rows, 1)


def _rounded(values: Float64) -> Float32:
    mantissa, exponent = np.frexp(values)
    scale = float(1 << _BITS)
    return np.ldexp(np.round(mantissa * scale) / scale, exponent).astype(np.float32)
