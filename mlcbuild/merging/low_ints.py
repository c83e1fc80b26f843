"""Checkpoints whose matrices are whole numbers of a few bits, with scales beside them, in rows `[N, K]`.

compressed-tensors  `x_packed`, words of 32 bits (dense, lowest first, 2^(bits-1) added to each number), or `x` int8;
                    `x_scale` [N, groups]; `x_zero_point`, packed along N where the numbers are; `x_g_idx` [K]
mlx                 `x.weight`, words of 32 bits (dense, lowest first); `x.scales` and `x.biases` [N, groups]
bitsandbytes        8 bits: `x.weight` int8 and `x.SCB` [N], 127 times the scale. 4 bits: `x.weight`, bytes of two
                    numbers, the upper half first: places in `quant_map`, times `absmax` of their block; which, doubly
                    quantized, are places in `nested_quant_map`, times `nested_absmax` of theirs, plus an offset
awq_gemv            `x.qweight` and `x.qzeros`, words of 32 bits along K and along groups; `x.scales`, wider than those

Sources: vllm-project/compressed-tensors compressors/pack_quantized, ml-explore/mlx mlx/ops.cpp, bitsandbytes
functional.py (QuantState), casper-hansen/AutoAWQ awq/modules/linear/gemv.py. All is computed in float32; a product with
a 16-bit scale is exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlcbuild.checkpoints.computed import Computed, place
from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.mapped import FLOATS, MappedFile
from mlcbuild.errors import CheckpointError
from mlcbuild.merging.prequantized import Scheme
from mlcbuild.quantization import floats
from mlcbuild.quantization.awq import unpack_natural

Array = npt.NDArray[Any]
Table = Mapping[str, TensorRef]
_PIECE = 1 << 20  # elements that are made at once
_INTEGERS = {"I8": "i1", "U8": "u1", "I32": "<i4", "U32": "<u4", "I64": "<i8"}
_BNB_STATE = ".quant_state.bitsandbytes__"
# What else lies there: of activations and caches, and what follows from the shapes.
_UNUSED = ("input_scale", "input_zero_point", "k_scale", "v_scale", "q_scale", "output_scale", "weight_format")


class Found(NamedTuple):
    """A matrix `name` [N, K], the tensors that it is made of, and its rows: `values` gives those of a slice."""

    name: str
    shape: tuple[int, int]
    used: tuple[str, ...]
    values: Callable[[slice], Array]


def plan(table: Table, scheme: Scheme) -> tuple[dict[str, TensorRef], list[Computed]]:
    """The table with each such matrix as the tensor of float32 that it stands for, and how to make those.

    The new entries are placed in files `tensors-N.bin`. Raises CheckpointError with everything that does not fit.
    """
    problems, found = [], []
    for name in table:
        try:
            each = _FINDERS[scheme.method](name, table, scheme)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if each is not None:
            found.append(each)
    if problems:
        raise CheckpointError("\n".join(problems))
    if not found:
        raise CheckpointError(
            f"config.json says that the checkpoint was quantized by {scheme.method}, but it has no such tensors"
        )
    placed = place(map(_computed, found))
    used = {name for each in found for name in each.used} | {n for n in table if n.rpartition(".")[2] in _UNUSED}
    plain = {name: ref for name, ref in table.items() if name not in used}
    return plain | {each.target.name: each.target for each in placed}, placed


def _computed(found: Found) -> Computed:
    target = TensorRef(found.name, "", "", Path(), 0, 4 * prod(found.shape), "F32", found.shape)
    return Computed(target, partial(_pieces, found))


def _pieces(found: Found) -> Iterator[Array]:
    rows, columns = found.shape
    for start in range(0, rows, step := max(1, _PIECE // max(1, columns))):
        values = found.values(slice(start, min(rows, start + step)))
        if not np.isfinite(values).all():
            raise CheckpointError(f"tensor {found.name}: numbers that are none or infinite; the checkpoint is damaged")
        yield np.ascontiguousarray(values, np.float32)


def _read(ref: TensorRef) -> Array:
    """The tensor's numbers as they are stored, floats as float32."""
    content = MappedFile(ref.path).bytes(ref.offset, ref.nbytes)
    if ref.dtype in FLOATS:
        return floats.widen(content.view(FLOATS[ref.dtype][1]), FLOATS[ref.dtype][0]).reshape(ref.shape)
    if ref.dtype not in _INTEGERS:
        raise CheckpointError(f"{ref.file}: tensor {ref.name}: dtype {ref.dtype}, which is not expected there")
    return content.view(_INTEGERS[ref.dtype]).reshape(ref.shape)


def _beside(table: Table, name: str, wanted: str) -> TensorRef:
    if wanted not in table:
        raise CheckpointError(f"{table[name].file}: tensor {name}: there is no {wanted} beside it")
    return table[wanted]


def _affine(codes: Callable[[slice], Array], scales: Array, zeros: Array | None, group_of: Array) -> Any:
    """(code - zero) * scale of some rows; scales and zeros are [N or 1, groups]."""

    def values(rows: slice) -> Array:
        own = slice(None) if len(scales) == 1 else rows
        made = codes(rows).astype(np.float32)
        if zeros is not None:
            made -= zeros[own][:, group_of]
        made *= scales[own][:, group_of]
        return made

    return values


def _scales(ref: TensorRef, shape: tuple[int, int]) -> Array:
    """[N or 1, groups]. Raises CheckpointError where groups are not equal parts of K."""
    found = _read(ref).reshape(1, 1) if prod(ref.shape) == 1 else _read(ref)
    found = found.reshape(-1, 1) if found.ndim == 1 else found
    if found.ndim != 2 or found.shape[0] not in (1, shape[0]) or not found.shape[1] or shape[1] % found.shape[1]:
        raise CheckpointError(
            f"{ref.file}: tensor {ref.name}: shape {list(ref.shape)}, expected scales of whole groups in {list(shape)}"
        )
    return found


def _groups(columns: int, groups: int) -> Array:
    return np.arange(columns) // (columns // groups)


def _words(ref: TensorRef, bits: int, columns: int) -> Callable[[slice], Array]:
    words = _read(ref).view("<u4")
    return lambda rows: unpack_natural(np.ascontiguousarray(words[rows]), bits)[:, :columns]


def _compressed(name: str, table: Table, scheme: Scheme) -> Found | None:
    base = name.removesuffix("_packed")
    ref = table[name]
    if name.endswith(".weight_packed"):
        shape = tuple(int(size) for size in _read(_beside(table, name, f"{base}_shape")))
        fitting = [bits for bits in scheme.choices if ref.shape == (shape[0], -(-shape[-1] * bits // 32))]
        if len(shape) != 2 or not fitting:
            raise CheckpointError(
                f"{ref.file}: tensor {name}: shape {list(ref.shape)}, but {list(shape)} in {base}_shape want words of "
                f"{' or '.join(map(str, scheme.choices))} bits"
            )
        bits, offset = fitting[0], 1 << (fitting[0] - 1)
        unpacked = _words(ref, bits, shape[1])
        codes: Callable[[slice], Array] = lambda rows: unpacked(rows) - np.float32(offset)  # noqa: E731
    elif ref.dtype == "I8" and f"{name}_scale" in table and len(ref.shape) == 2:
        shape, bits, numbers = ref.shape, 0, _read(ref)
        codes = lambda rows: numbers[rows]  # noqa: E731
    else:
        return None
    scales = _scales(_beside(table, name, f"{base}_scale"), (shape[0], shape[1]))
    zeros = _compressed_zeros(table.get(f"{base}_zero_point"), bits, scales)
    group_of = _groups(shape[1], scales.shape[1])
    if (index := table.get(f"{base}_g_idx")) is not None:
        given = _read(index).astype(np.int64)
        if given.shape != (shape[1],) or given.max(initial=0) >= scales.shape[1]:
            raise CheckpointError(f"{index.file}: tensor {index.name}: not a group for each of {shape[1]} columns")
        group_of = group_of if given.min(initial=0) < 0 else given
    used = (name, *(f"{base}_{part}" for part in ("shape", "scale", "zero_point", "g_idx")))
    return Found(base, (shape[0], shape[1]), used, _affine(codes, scales, zeros, group_of))


def _compressed_zeros(ref: TensorRef | None, bits: int, scales: Array) -> Array | None:
    if ref is None:
        return None
    if ref.dtype in ("I32", "U32") and bits:  # packed along N
        columns = np.ascontiguousarray(_read(ref).view("<u4").reshape(-1, scales.shape[1]).T)
        zeros = unpack_natural(columns, bits)[:, : len(scales)].T - np.float32(1 << (bits - 1))
    else:
        zeros = _read(ref).astype(np.float32)
    if zeros.size != scales.size:
        raise CheckpointError(
            f"{ref.file}: tensor {ref.name}: shape {list(ref.shape)}, but {list(scales.shape)} scales"
        )
    return zeros.reshape(scales.shape)


def _mlx(name: str, table: Table, scheme: Scheme) -> Found | None:
    base = name.removesuffix(".scales")
    if base == name or f"{base}.weight" not in table:
        return None
    words, scales = table[f"{base}.weight"], table[name]
    own = scheme.layers.get(base)
    group = own.get("group_size", scheme.group_size) if isinstance(own, Mapping) else scheme.group_size
    rows, columns = scales.shape[0], scales.shape[-1] * group
    bits = words.shape[-1] * 32 / columns if columns else 0
    if words.dtype != "U32" or len(words.shape) != 2 or bits not in (2, 3, 4, 5, 6, 8) or words.shape[0] != rows:
        raise CheckpointError(
            f"{words.file}: tensor {words.name}: {words.dtype} {list(words.shape)}, but {list(scales.shape)} scales of "
            f"groups of {group} want words of 2 to 8 bits"
        )
    factors, shifts = (
        _scales(_beside(table, name, f"{base}.{part}"), (rows, columns)) for part in ("scales", "biases")
    )
    group_of = _groups(columns, factors.shape[1])
    scaled = _affine(_words(words, int(bits), columns), factors, None, group_of)
    used = (f"{base}.weight", name, f"{base}.biases")
    return Found(f"{base}.weight", (rows, columns), used, lambda part: scaled(part) + shifts[part][:, group_of])


def _bitsandbytes(name: str, table: Table, scheme: Scheme) -> Found | None:
    if name.endswith(".SCB"):
        base = f"{name.removesuffix('.SCB')}.weight"
        ref = _beside(table, name, base)
        numbers, shape = _read(ref), ref.shape
        scales = _scales(table[name], (shape[0], shape[-1])) / np.float32(127)
        made = _affine(lambda rows: numbers[rows], scales, None, np.zeros(shape[-1], np.int64))
        return Found(base, (shape[0], shape[-1]), (name, base), made)
    base, found, kind = name.partition(_BNB_STATE)
    if not found:
        return None
    try:
        state = json.loads(bytes(_read(table[name])))
        shape, block = tuple(map(int, state["shape"])), int(state["blocksize"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{table[name].file}: tensor {name}: not the JSON that bitsandbytes writes") from None
    words = _read(_beside(table, name, base)).reshape(-1)
    codes, largest = (_read(_beside(table, name, f"{base}.{part}")) for part in ("quant_map", "absmax"))
    if f"{base}.nested_absmax" in table:
        nested, outer = _read(_beside(table, name, f"{base}.nested_quant_map")), _read(table[f"{base}.nested_absmax"])
        blocks = np.arange(largest.size) // int(state["nested_blocksize"])
        largest = nested[largest] * outer[blocks] + np.float32(state["nested_offset"])
    if len(shape) != 2 or 2 * words.size < prod(shape) or block * largest.size < prod(shape) or codes.size != 16:
        raise CheckpointError(
            f"{table[name].file}: tensor {base}: {kind} of {list(shape)} in blocks of {block} has more"
        )
    used = (base, name, *(f"{base}.{part}" for part in ("quant_map", "absmax", "nested_absmax", "nested_quant_map")))
    return Found(base, (shape[0], shape[1]), used, partial(_of_blocks, words, codes, largest, block, shape[1]))


def _of_blocks(words: Array, codes: Array, largest: Array, block: int, columns: int, rows: slice) -> Array:
    begin, end = rows.start * columns, rows.stop * columns
    taken = words[begin // 2 : -(-end // 2)]
    halves = np.stack([taken >> 4, taken & 15], axis=1).reshape(-1)[begin % 2 :][: end - begin]
    made: Array = codes[halves] * largest[np.arange(begin, end) // block]
    return made.reshape(-1, columns)


def _awq_gemv(name: str, table: Table, scheme: Scheme) -> Found | None:
    base = name.removesuffix(".qweight")
    if base == name:
        return None
    words = table[name]
    rows, columns = words.shape[0], words.shape[-1] * 8
    groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
    zeros, scales = (_beside(table, name, f"{base}.{part}") for part in ("qzeros", "scales"))
    if columns % groups or zeros.shape[-1] * 8 < groups or scales.shape[-1] < groups:
        raise CheckpointError(
            f"{words.file}: tensor {name}: {list(words.shape)} in groups of {scheme.group_size}, but zero points "
            f"{list(zeros.shape)} and scales {list(scales.shape)}"
        )
    codes = _words(words, 4, columns)
    made = _affine(codes, _read(scales)[:, :groups], _words(zeros, 4, groups)(slice(None)), _groups(columns, groups))
    used = (name, zeros.name, scales.name)
    return Found(f"{base}.weight", (rows, columns), used, made)


_FINDERS: dict[str, Callable[[str, Table, Scheme], Found | None]] = {
    "compressed-tensors": _compressed,
    "mlx": _mlx,
    "bitsandbytes": _bitsandbytes,
    "awq_gemv": _awq_gemv,
}
