"""A library of a model's pieces (mlcbuild.models.layer_pieces, encoder_pieces), and texts that go through it.

Hidden states are float32 [tokens, hidden_size] of one window of a text. Weights are given with each call, as tensors in
the library's order, so that those of one layer at a time are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import threads, tvm_runtime
from mlcbuild.runtime.library import Library

Float32 = npt.NDArray[np.float32]
Tensors = Sequence[Any]

_PAGE_SIZE = 16
_SEQUENCE = 0  # the number of the only one


class Pieces:
    """An opened library of pieces; a decoder's KV cache has a place for each kind of layer, and one sequence."""

    def __init__(self, path: Path) -> None:
        """Raises MlcBuildError where `path` is not such a library for this machine."""
        threads.configure(threads.choose())
        self.library = Library(path)
        self._encoder = self.library.has("encoder_layer_inputs")
        if not (self._encoder or self.library.has("decoder_layer_inputs")):
            raise MlcBuildError(f"{path}: a library of a whole model, expected one of a model's pieces")
        metadata = self.library.metadata
        self.window, self.chunk = metadata.context_window_size, metadata.prefill_chunk_size
        if self._encoder:
            return
        sizes = (1, self.window, self.chunk, _PAGE_SIZE, 0)
        self._cache = self.library["create_tir_paged_kv_cache"](*(tvm_runtime.shape(size) for size in sizes))

    def embed(self, ids: Sequence[int], embedding: Tensors) -> Float32:
        """The embeddings of token ids, which must be rows of the table: they are not checked."""
        array = np.asarray(ids, np.int32)
        return np.concatenate([self._call("embed", piece, embedding) for piece in self._pieces(array)])

    def begin(self, hidden: Float32, weights: Tensors) -> Float32:
        """What the first layer is given for the embeddings of a window: scaled, positions added ..."""
        if not self.library.has("beginning"):
            return hidden
        positions = self._pieces(np.arange(len(hidden), dtype=np.int32))
        pieces = zip(self._pieces(hidden), positions, strict=True)
        return np.concatenate([self._call("beginning", x, [tvm_runtime.tensor(at), *weights]) for x, at in pieces])

    def layer(self, hidden: Float32, weights: Tensors, kind: int = 0) -> Float32:
        """The output of a layer of this kind (Structure.layer_kinds) for a window, as a sequence of its own."""
        return np.concatenate([out for out, *_ in self._layer("layer", hidden, weights, kind)])

    def layer_with_inputs(self, hidden: Float32, weights: Tensors, kind: int = 0) -> Iterator[list[Float32]]:
        """The layer's output and what its matrices are multiplied with, in pieces: [tokens, H], [tokens, K], ...

        What experts are multiplied with is followed by which of them the tokens chose, [tokens, choices].
        """
        return self._layer("layer_inputs", hidden, weights, kind)

    def normed(self, hidden: Float32, final_norm: Tensors) -> Float32:
        """What the head is given."""
        return np.concatenate([self._call("final_norm", piece, final_norm) for piece in self._pieces(hidden)])

    def logits(self, normed: Float32, head: Tensors) -> Float32:
        """float32 [tokens, rows of the head's matrix], for at most `chunk` tokens."""
        return self._call("head", normed, head)

    def _layer(self, name: str, hidden: Float32, weights: Tensors, kind: int) -> Iterator[list[Float32]]:
        name = f"{'encoder' if self._encoder else 'decoder'}_{name}"
        function = self.library[name if kind == 0 else f"{name}_{kind}"]
        if self._encoder:  # a text is whole in every call
            mask = tvm_runtime.tensor(np.ones((1, len(hidden)), np.int32))
            yield _arrays(function(tvm_runtime.tensor(hidden), mask, *weights))
            return
        with self._sequence():
            for piece in self._pieces(hidden):
                self._state("begin_forward", tvm_runtime.shape(_SEQUENCE), tvm_runtime.shape(len(piece)))
                try:
                    found = function(tvm_runtime.tensor(piece), self._cache, kind, *weights)
                finally:
                    self._state("end_forward")
                yield _arrays(found)

    def _call(self, name: str, x: npt.NDArray[Any], weights: Tensors) -> Float32:
        result = self.library[name](tvm_runtime.tensor(x), *weights)
        return tvm_runtime.array(result, tuple(result.shape))

    def _pieces(self, rows: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
        return (rows[start : start + self.chunk] for start in range(0, len(rows), self.chunk))

    @contextmanager
    def _sequence(self) -> Iterator[None]:
        """A new, empty sequence in the cache."""
        self._state("add_sequence", _SEQUENCE)
        try:
            yield
        finally:
            self._state("remove_sequence", _SEQUENCE)

    def _state(self, method: str, *arguments: Any) -> None:
        tvm_runtime.function(f"vm.builtin.kv_state_{method}")(self._cache, *arguments)


def _arrays(found: Any) -> list[Float32]:
    """Of a function's result, or of all of them."""
    results = [found] if hasattr(found, "shape") else list(found)
    return [tvm_runtime.array(result, tuple(result.shape)) for result in results]
