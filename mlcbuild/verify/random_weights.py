"""Weights of a structure in a quantization, of random numbers: for a library that is tried before there are any."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlcbuild.models.parameters import Parameter, parameters
from mlcbuild.models.structure import Structure
from mlcbuild.quantization.schemes import QuantizedParameter, quantized_parameters
from mlcbuild.quantization.stream import quantize
from mlcbuild.recipes.types import Quantization

_BLOCK = 1_000_003  # numbers; a prime, so that no two rows of a matrix are alike
_PIECE = _BLOCK // 2  # numbers of a matrix that lie together
_STEP = 7919  # numbers between the beginnings of two pieces; a prime, too
_AWQ_DEVIATION = 6.5  # of a random code from a random zero point


def make(structure: Structure, vocabulary: int, quantization: Quantization, folder: Path, scratch: Path) -> Path:
    """A weights folder, `folder`, of `vocabulary` tokens. The same arguments make the same bytes.

    Matrices `[N, K]` have a deviation of K^-1/2, which keeps the length of what they are multiplied with; norms lie
    around 1, biases and the rates of keys around 0 (as Doge has them at first), the rates of state spaces around -1: of
    a positive rate a state grows without end. (Lightning attention has them without the sign.) Of heads whose scores
    have a scale of their own (1, in Gemma 4), norms lie around what makes the scores' deviation 1: they would else grow
    with the head, and one key of all have the whole softmax. Where hidden states have the length 1, factors of what
    matrices make of them lie around what makes that as long again, as for any other model.
    """
    rate = 1.0 if structure.mixer == "lightning" else -1.0
    scale = structure.attention_scale if structure.qk_norm == "head" else None
    factor = structure.hidden_size**0.5 if structure.norm_length else 1.0
    wanted = parameters(replace(structure, vocab_size=vocabulary))
    blocks = _Blocks(scratch / "numbers.bin")
    made: dict[str, list[QuantizedParameter]] = {}
    for tensor in quantized_parameters(wanted, quantization):
        made.setdefault(tensor.source, []).append(tensor)
    entries = [_entry(parameter, made[parameter.name], blocks, rate, scale, factor) for parameter in wanted]
    folder.mkdir()
    quantize({"parameters": entries}, {_Blocks.name: blocks.write()}, wanted, quantization, folder, scratch=scratch)
    return folder


def _entry(
    parameter: Parameter,
    tensors: list[QuantizedParameter],
    blocks: _Blocks,
    rate: float,
    scale: float | None,
    factor: float,
) -> dict[str, Any]:
    """The parameter as parameters.json has one. `scale`: of scores of normed heads; factors lie around `factor`."""
    shape = list(parameter.shape)
    packed = tensors[0].weights
    entry: dict[str, Any] = {"name": parameter.name, "shape": shape, "dtype": "bfloat16"}
    if packed is not None and packed.scheme == "awq":
        scale = shape[-1] ** -0.5 / _AWQ_DEVIATION
        ready = {t.form: [blocks.awq(t.shape, scale if t.form == "scales" else None)] for t in tensors}
        return {
            **entry,
            "parts": [],
            "packed": {"scheme": "awq", "bits": packed.bits, "group_size": packed.group_size, "tensors": ready},
        }
    if parameter.role == "state_rate":
        return {**entry, "parts": [blocks.part((rate, 0.1), shape)]}
    if not parameter.is_matrix:
        centre = 0.0 if parameter.role.endswith(("_bias", "key_rate")) else 1.0
        centre = factor if parameter.role.endswith("_scale") else centre
        if scale is not None and parameter.role in ("q_norm", "k_norm"):
            centre = (scale * shape[-1] ** 0.5) ** -0.5
        return {**entry, "parts": [blocks.part((centre, 0.1 * (centre or 1)), shape)]}
    *experts, rows, columns = shape
    most = max(1, _PIECE // columns)
    pieces = [min(most, rows - start) for _ in range(prod(experts)) for start in range(0, rows, most)]
    return {**entry, "parts": [blocks.part((0.0, columns**-0.5), [count, columns]) for count in pieces]}


class _Blocks:
    """A file of blocks of random numbers, each described before any is written; parameters are pieces of them."""

    name = "numbers"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets: dict[Any, int] = {}  # by what is in the block
        self._end = 0
        self._pieces = 0

    def part(self, normal: tuple[float, float], shape: list[int]) -> dict[str, Any]:
        """Numbers with this mean and deviation, another piece of their block each time."""
        start = self._place(normal, 2 * _BLOCK)
        self._pieces += 1
        first = self._pieces * _STEP % (_BLOCK - prod(shape) + 1)
        return self._part(start + 2 * first, 2 * prod(shape), shape)

    def awq(self, shape: tuple[int, ...], scale: float | None) -> dict[str, Any]:
        """A tensor of random words, or of one scale."""
        itemsize, dtype = (4, "uint32") if scale is None else (2, "float16")
        nbytes = itemsize * prod(shape)
        return {**self._part(self._place((nbytes, scale), nbytes), nbytes, list(shape)), "dtype": dtype}

    def write(self) -> Path:
        """The file, with every block that was asked for."""
        random = np.random.default_rng(0)
        numbers = random.standard_normal(_BLOCK, np.float32)
        with self._path.open("wb") as file:
            for (first, second), offset in self._offsets.items():
                file.seek(offset)
                if isinstance(first, int):
                    words = random.integers(0, 1 << 32, first // 4, np.uint32)
                    file.write((words if second is None else np.full(first // 2, second, np.float16)).tobytes())
                else:
                    values = (numbers * np.float32(second) + np.float32(first)).view(np.uint16)
                    file.write(values[1::2].tobytes())  # the upper halves: bfloat16
        return self._path

    def _place(self, what: tuple[float, float | None], nbytes: int) -> int:
        if what not in self._offsets:
            self._offsets[what] = self._end
            self._end += -(-nbytes // 64) * 64
        return self._offsets[what]

    def _part(self, offset: int, nbytes: int, shape: list[int]) -> dict[str, Any]:
        return {
            "blob": self.name,
            "file": self._path.name,
            "tensor": self.name,
            "offset": offset,
            "nbytes": nbytes,
            "shape": shape,
        }
