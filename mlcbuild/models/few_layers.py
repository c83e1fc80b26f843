"""The structures of libraries with a layer of each kind, in place of all layers of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mlcbuild.models.kinds import ENCODER, TEXT_WINDOW
from mlcbuild.models.structure import Structure

TEXT_CHUNK = 256  # tokens of one call, where a text is evaluated


def one_layer(s: Structure) -> Structure:
    """The structure of a library that computes one layer at a time, over texts (mlcbuild.models.layer_pieces).

    It has a single layer of each kind and limits that suit whoever goes through a text, so that models which differ
    in these only share it. An encoder takes a text in one call.
    """
    return _of(s, _firsts(s), 1, TEXT_WINDOW if s.kind == ENCODER else TEXT_CHUNK)


def two_layers(s: Structure) -> Structure:
    """The structure of a small model whose library has this one's kernels: a layer of each kind, and two at least.

    Its limits suit short texts, two at once.
    """
    firsts = _firsts(s)
    second = [1] if len(firsts) == 1 and s.num_hidden_layers > 1 else []
    return _of(s, [*firsts, *second], 2, TEXT_CHUNK + 16)  # CUDA's large blocks are for more than 256 tokens


def _firsts(s: Structure) -> list[int]:
    """The first layer of each kind."""
    kinds = s.layer_kinds
    return [kinds.index(kind) for kind in sorted(set(kinds))]


def _of(s: Structure, layers: Sequence[int], texts: int, chunk: int = TEXT_CHUNK) -> Structure:
    # Frequencies that depend on the longest text (mlcbuild.models.rope) stay what they are.
    scaling = s.rope_scaling
    if scaling is not None and scaling["rope_type"] in ("dynamic", "longrope"):
        scaling = {**scaling, "length": s.context_window_size}
    types = [s.layer_type(layer) for layer in layers]
    own = {kind: at for at, kind in enumerate(types) if not s.borrows(layers[at])}
    return dataclasses.replace(
        s,
        keys_from=None
        if s.keys_from is None
        else tuple(
            own[kind] if s.borrows(layer) else at for at, (layer, kind) in enumerate(zip(layers, types, strict=True))
        ),
        joins=None if s.joins is None else (0,) * len(layers),
        rules=tuple(rule.of_layers(layers) for rule in s.rules),
        layer_types=None if s.layer_types is None else tuple(s.layer_types[layer] for layer in layers),
        rope_layers=None if s.rope_layers is None else tuple(s.rope_layers[layer] for layer in layers),
        by_layer=tuple((name, tuple(values[layer] for layer in layers)) for name, values in s.by_layer),
        num_hidden_layers=len(layers),
        rope_scaling=scaling,
        context_window_size=TEXT_WINDOW,
        prefill_chunk_size=chunk,
        max_batch_size=texts,
    )
