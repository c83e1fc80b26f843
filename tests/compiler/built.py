"""A compiled tiny llama with transformers beside it, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlcbuild.recipes.types import Quantization, Target
from mlcbuild.runtime import tvm_runtime
from mlcbuild.runtime.library import Library, Network
from mlcbuild.runtime.session import Session
from tests.compiler.packing import pack_model
from tests.support import llama
from tests.support.llama import Array


class Built:
    """A library, the parameters it was given, and transformers on the weights that they stand for."""

    def __init__(
        self,
        folder: Path,
        quantization: str | Quantization,
        changes: dict[str, Any],
        prefill_chunk_size: int = 100,
        target: Target = llama.UNOPTIMISED,
    ) -> None:
        if isinstance(quantization, str):
            quantization = llama.QUANTIZATIONS[quantization]
        reference = llama.transformers_llama(**changes)
        structure = llama.structure_of(reference, prefill_chunk_size=prefill_chunk_size)
        self.library = Library(llama.build_library(structure, quantization, folder, target))
        given, meant = pack_model(structure, quantization, llama.mlc_parameters(reference))
        self.reference = llama.with_parameters(reference, meant)
        tensors = []
        for (array, dtype), wanted in zip(given, self.library.metadata.parameters, strict=True):
            known = [size for size in wanted.shape if isinstance(size, int)]
            assert wanted.dtype == dtype and set(known) <= set(array.shape)
            tensor = tvm_runtime.tensor(array)
            tensors.append(tensor if str(array.dtype) == dtype else tvm_runtime.view(tensor, array.shape, dtype))
        self.network = Network(self.library, tensors, structure.vocab_size, 2)

    def session(self, sequences: int = 1) -> Session:
        return Session(self.network, sequences)

    def expected(self, ids: list[int]) -> Array:
        return llama.reference_logits(self.reference, ids)


def error(got: Array, expected: Array) -> float:
    """The largest difference over the standard deviation of the expected logits."""
    return float(np.abs(got - expected).max() / expected.std())
