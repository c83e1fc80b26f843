"""A package against the unquantized model, one layer after the other, for models that do not fit into memory.

All windows of the text go through a layer before the next layer is read. In memory are that layer's parameters as
float32, the package's of the same layer (mapped), and the hidden states of all windows on both sides. The vocabulary's
matrix comes in slices. The figures are those of whole models: the same kernels compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from mlcbuild.models.parameters import Parameter
from mlcbuild.models.structure import Structure
from mlcbuild.runtime import tvm_runtime
from mlcbuild.verify import evaluate
from mlcbuild.verify.packed import Packed
from mlcbuild.verify.pieces import Float32, Pieces, Tensors
from mlcbuild.verify.tensors import Unquantized, Windows, by_piece, embedded, widened

_SLICE = 1 << 22  # numbers of a large matrix that are float32 at once


@dataclass(frozen=True)
class Layers:
    """The figures of the logits, and how far apart both sides are on the way: ||q - p|| / ||p||.

    tensors   of the numbers of each matrix, by parameter name
    blocks    of the hidden states after the embedding, each layer and the final norm, each computed from its own side's
    """

    figures: evaluate.Figures
    tensors: dict[str, float]
    blocks: dict[str, float]


def compare(
    structure: Structure,
    reference: tuple[Pieces, Unquantized],
    package: tuple[Pieces, Packed],
    windows: Windows,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Layers:
    """Raises MlcBuildError as `evaluate.compare` does, and where hidden states are not finite, naming the layer."""
    model = by_piece(structure)
    (theirs, checkpoint), (ours, packed) = reference, package
    p = embedded(model, theirs, checkpoint, windows)
    given = packed.tensors(model.embedding)
    beginning = packed.tensors(model.beginning)
    q = [ours.begin(ours.embed(ids, given), beginning) for ids in windows]
    tables = [each for each in (*model.embedding, *model.beginning, *model.norm) if each.is_matrix]
    tensors = {each.name: _error(each, checkpoint, packed) for each in tables}
    blocks = {"embedding": _apart(q, p, "the embedding")}
    for number in range(model.layers):
        mine = model.layer(number)
        given = widened(mine, checkpoint)
        p = [theirs.layer(hidden, given, model.kinds[number]) for hidden in p]
        given = packed.tensors(mine)
        q = [ours.layer(hidden, given, model.kinds[number]) for hidden in q]
        tensors |= {each.name: _error(each, checkpoint, packed) for each in mine if each.is_matrix}
        blocks[f"layer {number}"] = _apart(q, p, f"layer {number}")
        progress(number + 1, model.layers)
    given = widened(model.norm, checkpoint)
    p = [theirs.normed(hidden, given) for hidden in p]
    given = packed.tensors(model.norm)
    q = [ours.normed(hidden, given) for hidden in q]
    blocks["final norm"] = _apart(q, p, "the final norm")
    head = model.head
    if head[0].name not in tensors:
        tensors[head[0].name] = _error(head[0], checkpoint, packed)
    given = packed.tensors(head)
    waiting_p, waiting_q = iter(p), iter(q)
    figures = evaluate.compare(
        lambda ids: _logits(ours, next(waiting_q), given),
        lambda ids: sliced_logits(theirs, next(waiting_p), checkpoint.rows_of, head),
        windows,
    )
    return Layers(figures, tensors, blocks)


def _logits(library: Pieces, normed: Float32, head: Tensors) -> Iterator[Float32]:
    for start in range(0, len(normed), library.chunk):
        yield library.logits(normed[start : start + library.chunk], head)


def sliced_logits(
    library: Pieces, normed: Float32, rows: Callable[[Parameter, int, int], Float32], head: Sequence[Parameter]
) -> Iterator[Float32]:
    """Logits [tokens, vocab_size] of all that the head is given, in pieces; `rows` reads a slice of its parameters."""
    for start in range(0, len(normed), library.chunk):
        piece = normed[start : start + library.chunk]
        found = [
            library.logits(piece, [tvm_runtime.tensor(rows(each, first, last)) for each in head])
            for first, last in slices(head[0])
        ]
        yield np.concatenate(found, axis=1)


def slices(parameter: Parameter) -> Iterator[tuple[int, int]]:
    """Row ranges of at most `_SLICE` numbers, of one expert each; within it they start at multiples of 8."""
    *experts, rows, width = parameter.shape
    step = max(8, _SLICE // width // 8 * 8)
    for first in range(0, prod(experts) * rows, rows):
        for start in range(first, first + rows, step):
            yield start, min(start + step, first + rows)


def _error(parameter: Parameter, checkpoint: Unquantized, packed: Packed) -> float:
    """||q - w|| / ||w|| of a matrix, a slice at a time."""
    difference = total = 0.0
    for start, stop in slices(parameter):
        w = checkpoint.rows(parameter.name, start, stop)
        total += _square(w)
        difference += _square(packed.rows(parameter, start, stop) - w)
    return _relative(difference, total)


def _apart(q: Sequence[Float32], p: Sequence[Float32], where: str) -> float:
    difference = sum(_square(ours - theirs) for ours, theirs in zip(q, p, strict=True))
    total = sum(_square(theirs) for theirs in p)
    if not np.isfinite(difference):
        whose = "the package's" if np.isfinite(total) else "the reference's"
        raise evaluate.NotFinite(f"{whose} hidden states are NaN or Inf after {where}")
    return _relative(difference, total)


def _square(values: Float32) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _relative(difference: float, total: float) -> float:
    return float(np.sqrt(difference / total)) if total else float(np.sqrt(difference))
