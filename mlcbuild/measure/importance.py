"""How much each input column of each matrix counts: the mean square of what runs through it, over a text.

The squared error that a wrong weight makes in a layer's output is weighted by it. The text goes through the unquantized
model layer by layer, in the memory of one layer. Figures are rounded to three significant digits in binary: the last
bits of a sum, which may differ between machines, then seldom show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError
from mlcbuild.measure.blocks import Blocks
from mlcbuild.measure.model import Model, Windows, embedded, widened
from mlcbuild.measure.unquantized import Unquantized
from mlcbuild.models.parameters import Parameter

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_BITS = 10


def importance(
    parameters: Sequence[Parameter],
    blocks: Blocks,
    checkpoint: Unquantized,
    windows: Windows,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Float32]:
    """By parameter name, `[K in]`: for every matrix of a layer and for the head, which may be the tied embedding.

    Raises MlcBuildError for a text without windows, and where hidden states are not finite, naming the layer.
    """
    model = Model(parameters)
    tokens = sum(len(ids) for ids in windows)
    hidden = embedded(model, blocks, checkpoint, windows)
    found: dict[str, Float32] = {}
    for number in range(model.layers):
        mine = model.layer(number)
        given = widened(mine, checkpoint)
        matrices = [each for each in mine if len(each.shape) == 2]
        sums = [np.zeros(each.shape[1]) for each in matrices]
        following = []
        for window in hidden:
            pieces = []
            for out, *inputs in blocks.layer_with_inputs(window, given):
                pieces.append(out)
                for total, x in zip(sums, inputs, strict=True):
                    total += np.square(x, dtype=np.float64).sum(axis=0)
            following.append(np.concatenate(pieces))
        hidden = following
        if not all(np.isfinite(total).all() for total in sums):
            raise MlcBuildError(f"layer {number}: what runs through the model is NaN or Inf; the checkpoint is damaged")
        found |= {each.name: _rounded(total / tokens) for each, total in zip(matrices, sums, strict=True)}
        progress(number + 1, model.layers)
    norm = widened(model.norm, checkpoint)
    total = sum(np.square(blocks.normed(window, norm), dtype=np.float64).sum(axis=0) for window in hidden)
    (head,) = model.head
    found[head.name] = _rounded(total / tokens)
    return found


def _rounded(values: Float64) -> Float32:
    mantissa, exponent = np.frexp(values)
    scale = float(1 << _BITS)
    return np.ldexp(np.round(mantissa * scale) / scale, exponent).astype(np.float32)
