"""Checkpoints whose matrices are floats of 8 or 4 bits, with scales beside them.

fp8     `x` (F8_E4M3 or F8_E5M2) and `x_scale_inv` or `x_scale`: one number, one for each row, or one for each block of
        rows and columns (DeepSeek-V3, arXiv 2412.19437, 3.3.2; Qwen; compressed-tensors). A value is their product
mxfp4   `x_blocks` [..., N, K / 32, 16] of two values to a byte, the lower half first, and `x_scales` [..., N, K / 32],
        powers of two (OCP Microscaling Formats v1.0, 5.1 and 5.3.3), as gpt-oss has its experts: `x` is [..., K, N]

Values of mxfp4 are bfloat16s, exactly. Those of fp8 are float32: the product with a 16-bit scale is exact, that with
one of 32 bits is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.checkpoints.computed import Computed, exchanged
from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.mapped import FLOATS, MappedFile
from mlcbuild.errors import CheckpointError
from mlcbuild.merging import ternary
from mlcbuild.merging.prequantized import Scheme
from mlcbuild.quantization import floats

Array = npt.NDArray[Any]
_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")
# Of activations and caches: they say how others round what they compute with, which is not rounded here.
_UNUSED = ("input_scale", "activation_scale", "k_scale", "v_scale", "q_scale", "output_scale")
_PIECE = 1 << 20  # elements that are made at once
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def plan(table: Mapping[str, TensorRef], scheme: Scheme) -> tuple[dict[str, TensorRef], list[Computed]]:
    """The table with each such matrix as the tensor of floats that it stands for, and how to make those.

    The new entries are placed in files `tensors-N.bin`. Raises CheckpointError with everything that does not fit.
    """
    problems: list[str] = []
    find = {"mxfp4": _blocks, "bitnet": ternary.find}.get(scheme.method, _scaled)
    made = [each for name in table if (each := find(name, table, scheme, problems)) is not None]
    problems += [
        f"{table[names[0]].file}: tensor {names[0]}: it stands for {list(each.target.shape)} numbers"
        for each, names in made
        if not prod(each.target.shape)
    ]
    if problems:
        raise CheckpointError("\n".join(problems))
    if not made:
        raise CheckpointError(
            f"config.json says that the checkpoint was quantized by {scheme.method}, but it has no tensor "
            + {"mxfp4": "x_blocks", "bitnet": "x_proj.weight"}.get(scheme.method, f"of dtype {' or '.join(_FP8)}")
        )
    used = {name for _, names in made for name in names}
    used |= {name for name in table if name.rpartition(".")[2] in _UNUSED}
    return exchanged(table, [each for each, _ in made], used)


_Found = tuple[Computed, tuple[str, ...]]


def _target(name: str, dtype: str, shape: tuple[int, ...], pieces: Callable[[], Iterator[Array]]) -> Computed:
    nbytes = prod(shape) * FLOATS[dtype][1].itemsize
    return Computed(TensorRef(name, "", "", Path(), 0, nbytes, dtype, shape), pieces)


def _bytes(ref: TensorRef) -> Array:
    return MappedFile(ref.path).bytes(ref.offset, ref.nbytes).reshape(ref.shape)


def _blocks(name: str, table: Mapping[str, TensorRef], scheme: Scheme, problems: list[str]) -> _Found | None:
    if not name.endswith("_blocks"):
        return None
    base, blocks = name.removesuffix("_blocks"), table[name]
    scales = table.get(f"{base}_scales")
    if scales is None:
        problems.append(f"{blocks.file}: tensor {name}: there is no {base}_scales beside it")
        return None
    for ref, shape in ((blocks, (*scales.shape, 16)), (scales, blocks.shape[:-1])):
        if ref.dtype != "U8" or ref.shape != shape or len(blocks.shape) < 3:
            problems.append(f"{ref.file}: tensor {ref.name}: {ref.dtype} {list(ref.shape)}, expected U8 {list(shape)}")
            return None
    *before, rows, groups, _ = blocks.shape
    made = _target(base, "BF16", (*before, groups * 32, rows), partial(_from_blocks, blocks, scales))
    return made, (name, scales.name)


def _from_blocks(blocks: TensorRef, scales: TensorRef) -> Iterator[Array]:
    """One matrix [K, N] after the other, as bfloat16s."""
    *_, rows, groups, _ = blocks.shape
    pairs = zip(_bytes(blocks).reshape(-1, rows, groups, 16), _bytes(scales).reshape(-1, rows, groups), strict=True)
    for words, powers in pairs:
        values = np.stack([_FP4[words & 15], _FP4[words >> 4]], axis=-1).reshape(rows, groups, 32)
        values = np.ldexp(values, powers.astype(np.int32)[..., None] - 127)
        if (powers == 255).any():  # no number (OCP Microscaling Formats v1.0, 5.4.1)
            raise CheckpointError(f"{scales.file}: tensor {scales.name}: not finite; the checkpoint is damaged")
        if not np.isfinite(values).all():
            raise CheckpointError(f"{scales.file}: tensor {scales.name}: too large; the checkpoint is damaged")
        yield floats.cast(np.ascontiguousarray(values.reshape(rows, groups * 32).T), "float32", "bfloat16")


def _scaled(name: str, table: Mapping[str, TensorRef], scheme: Scheme, problems: list[str]) -> _Found | None:
    ref = table[name]
    if ref.dtype not in _FP8 or name.rpartition(".")[2] in _UNUSED:
        return None
    scale = next((table[name + end] for end in _SCALES if name + end in table), None)
    if scale is None:
        problems.append(f"{ref.file}: tensor {name}: there is no {name}{_SCALES[0]} or {name}{_SCALES[1]} beside it")
        return None
    if scale.dtype not in (*FLOATS, "F8_E8M0"):
        problems.append(f"{scale.file}: tensor {scale.name}: dtype {scale.dtype}, expected {', '.join(FLOATS)}")
        return None
    block = _block(ref, scale, scheme)
    if block is None:
        problems.append(
            f"{scale.file}: tensor {scale.name}: shape {list(scale.shape)}, but {list(ref.shape)} of {name} want one "
            f"scale, one for each row, or blocks of {list(scheme.block)}"
        )
        return None
    return _target(name, "F32", ref.shape, partial(_products, ref, scale, block)), (name, scale.name)


def _block(ref: TensorRef, scale: TensorRef, scheme: Scheme) -> tuple[int, int] | None:
    """Rows and columns that a scale is for; None where the shapes do not fit. Of three axes, the first is apart."""
    if len(ref.shape) not in (2, 3):
        return None
    rows, columns = ref.shape[-2:]
    if prod(scale.shape) == 1:
        return ref.shape[0] * rows, columns
    if scale.shape in (ref.shape[:-1], (*ref.shape[:-1], 1)):
        return 1, columns
    high, wide = scheme.block
    fits = scale.shape == (*ref.shape[:-2], -(-rows // high), -(-columns // wide))
    return (high, wide) if fits else None


def _products(ref: TensorRef, scale: TensorRef, block: tuple[int, int]) -> Iterator[Array]:
    (high, wide), (rows, columns) = block, ref.shape[-2:]
    every = _bytes(ref).reshape(-1, rows, columns)
    scales = _scales(scale).reshape(1 if prod(scale.shape) == 1 else len(every), -1, -(-columns // wide))
    if not np.isfinite(scales).all():
        raise CheckpointError(f"{scale.file}: tensor {scale.name}: not finite; the checkpoint is damaged")
    table = _values(ref.dtype)
    for number, words in enumerate(every):
        of_matrix = scales[min(number, len(scales) - 1)]
        for start in range(0, rows, step := max(1, _PIECE // columns)):
            values = table[words[start : start + step]]
            if not np.isfinite(values).all():
                raise CheckpointError(
                    f"{ref.file}: tensor {ref.name}: numbers that are none or infinite; it is damaged"
                )
            mine = of_matrix[np.arange(start, start + len(values)) // high]
            values *= np.repeat(mine, wide, axis=1)[:, :columns]
            yield values


def _scales(ref: TensorRef) -> Array:
    words = MappedFile(ref.path).bytes(ref.offset, ref.nbytes)
    if ref.dtype == "F8_E8M0":
        powers: Array = np.ldexp(np.float32(1), words.astype(np.int32) - 127)
        return powers
    dtype, storage = FLOATS[ref.dtype]
    return floats.widen(words.view(storage), dtype)


@cache
def _values(dtype: str) -> Array:
    """The float32 of each byte: E4M3 has no infinities, E5M2 is the upper half of a float16."""
    code = np.arange(256, dtype=np.int32)
    if dtype == "F8_E5M2":
        return (code << 8).astype(np.uint16).view(np.float16).astype(np.float32)
    exponent, fraction = code >> 3 & 15, (code & 7).astype(np.float32)
    size = np.ldexp(np.where(exponent == 0, fraction, fraction + 8), np.maximum(exponent, 1) - 10)
    size[code & 127 == 127] = np.nan
    values: Array = np.where(code > 127, -size, size).astype(np.float32)
    return values
