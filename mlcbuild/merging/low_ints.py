"""Checkpoints whose matrices are whole numbers of a few bits, with scales beside them, in rows `[N, K]`.

compressed-tensors  `x_packed`, words of 32 bits (dense, lowest first, 2^(bits-1) added to each number), or `x` int8;
                    `x_scale` [N, groups]; `x_zero_point`, packed along N where the numbers are; `x_g_idx` [K]
mlx                 `x.weight`, words of 32 bits (dense, lowest first); `x.scales` and `x.biases` [N, groups]
bitsandbytes        8 bits: `x.weight` int8 and `x.SCB` [N], 127 times the scale. 4 bits: `x.weight`, bytes of two
                    numbers, the upper half first, in a tensor of any dtype: places in `quant_map`, times `absmax` of
                    their block; which, doubly quantized, are places in `nested_quant_map`, times `nested_absmax` of
                    theirs, plus an offset
awq_gemv            `x.qweight` and `x.qzeros`, words of 32 bits along K and along groups; `x.scales`, wider than those

Sources: vllm-project/compressed-tensors compressors/pack_quantized, ml-explore/mlx mlx/ops.cpp, bitsandbytes
functional.py (QuantState), casper-hansen/AutoAWQ awq/modules/linear/gemv.py. All is computed in float32; a product with
a 16-bit scale is exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from mlcbuild.checkpoints.computed import Computed, exchanged, row_pieces
from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.mapped import FLOATS, MappedFile
from mlcbuild.errors import CheckpointError
from mlcbuild.merging.prequantized import Scheme
from mlcbuild.quantization import floats
from mlcbuild.quantization.awq import unpack_natural

Array = npt.NDArray[Any]
Table = Mapping[str, TensorRef]
_INTEGERS = {"I8": "i1", "U8": "u1", "I32": "<i4", "U32": "<u4", "I64": "<i8"}
_WORDS = ("I32", "U32")
_STORAGE = ("U8", "I8", "F16", "BF16", "F32", "F64")  # bnb_4bit_quant_storage: what bytes of two numbers are held as
# What is raised where metadata say what cannot be: each is a problem of the tensor whose metadata they are.
_IMPOSSIBLE = (ValueError, TypeError, IndexError, KeyError, ArithmeticError)
_END = 1 << 31  # of blocks' sizes
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
        except _IMPOSSIBLE as error:
            problems.append(_wrong(table[name], f"{scheme.title} has nothing like it ({error!s:.100})"))
            continue
        if each is not None and min(each.shape) < 1:
            problems.append(_wrong(table[name], f"it stands for {list(each.shape)} numbers"))
        elif each is not None:
            found.append(each)
    if problems:
        raise CheckpointError("\n".join(problems))
    if not found:
        raise CheckpointError(
            f"config.json says that the checkpoint was quantized by {scheme.method}, but it has no such tensors"
        )
    used = {name for each in found for name in each.used} | {n for n in table if n.rpartition(".")[2] in _UNUSED}
    return exchanged(table, [_computed(each) for each in found], used)


def _computed(found: Found) -> Computed:
    target = TensorRef(found.name, "", "", Path(), 0, 4 * prod(found.shape), "F32", found.shape)
    return Computed(target, partial(_pieces, found))


def _pieces(found: Found) -> Iterator[Array]:
    for rows in row_pieces(found.shape):
        values = found.values(rows)
        if not np.isfinite(values).all():
            raise CheckpointError(f"tensor {found.name}: numbers that are none or infinite; the checkpoint is damaged")
        yield np.ascontiguousarray(values, np.float32)


def _wrong(ref: TensorRef, what: str) -> str:
    return f"{ref.file}: tensor {ref.name}: {what}"


def _refuse(ref: TensorRef, what: str) -> NoReturn:
    raise CheckpointError(_wrong(ref, what))


def _read(ref: TensorRef, dtypes: Collection[str] = FLOATS) -> Array:
    """The tensor's numbers as they are stored, floats as float32. Raises CheckpointError for one of another dtype."""
    if ref.dtype not in dtypes:
        _refuse(ref, f"dtype {ref.dtype}, expected {', '.join(dtypes)}")
    content = MappedFile(ref.path).bytes(ref.offset, ref.nbytes)
    if ref.dtype in FLOATS:
        return floats.widen(content.view(FLOATS[ref.dtype][1]), FLOATS[ref.dtype][0]).reshape(ref.shape)
    return content.view(_INTEGERS[ref.dtype]).reshape(ref.shape)


def _beside(table: Table, name: str, wanted: str) -> TensorRef:
    if wanted not in table:
        _refuse(table[name], f"there is no {wanted} beside it")
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
        _refuse(ref, f"shape {list(ref.shape)}, expected scales of whole groups in {list(shape)}")
    return found


def _groups(columns: int, groups: int) -> Array:
    return np.arange(columns) // (columns // groups)


def _words(ref: TensorRef, bits: int, columns: int) -> Callable[[slice], Array]:
    words = _read(ref, _WORDS).view("<u4")
    return lambda rows: unpack_natural(np.ascontiguousarray(words[rows]), bits)[:, :columns]


def _compressed(name: str, table: Table, scheme: Scheme) -> Found | None:
    base = name.removesuffix("_packed")
    ref = table[name]
    if name.endswith(".weight_packed"):
        shape = tuple(map(int, _read(_beside(table, name, f"{base}_shape"), ("I64", "I32")).reshape(-1)))
        fitting = [b for b in scheme.choices if len(shape) == 2 and ref.shape == (shape[0], -(-shape[1] * b // 32))]
        if not fitting:
            bits_of = " or ".join(map(str, scheme.choices))
            _refuse(ref, f"shape {list(ref.shape)}, but {list(shape)} in {base}_shape want words of {bits_of} bits")
        bits, offset = fitting[0], 1 << (fitting[0] - 1)
        unpacked = _words(ref, bits, shape[1])
        codes: Callable[[slice], Array] = lambda rows: unpacked(rows) - np.float32(offset)  # noqa: E731
    elif ref.dtype == "I8" and f"{name}_scale" in table and len(ref.shape) == 2:
        shape, bits, numbers = ref.shape, 0, _read(ref, ("I8",))
        codes = lambda rows: numbers[rows]  # noqa: E731
    else:
        return None
    scales = _scales(_beside(table, name, f"{base}_scale"), (shape[0], shape[1]))
    zeros = _compressed_zeros(table.get(f"{base}_zero_point"), bits, scales)
    group_of = _groups(shape[1], scales.shape[1])
    if (index := table.get(f"{base}_g_idx")) is not None:
        given = _read(index, ("I32", "I64")).astype(np.int64)
        if given.shape != (shape[1],) or given.max(initial=0) >= scales.shape[1]:
            _refuse(index, f"not a group for each of {shape[1]} columns")
        group_of = group_of if given.min(initial=0) < 0 else given
    used = (name, *(f"{base}_{part}" for part in ("shape", "scale", "zero_point", "g_idx")))
    return Found(base, (shape[0], shape[1]), used, _affine(codes, scales, zeros, group_of))


def _compressed_zeros(ref: TensorRef | None, bits: int, scales: Array) -> Array | None:
    if ref is None:
        return None
    packed = ref.dtype in _WORDS and bits > 0  # along N
    words = (-(-len(scales) * bits // 32), scales.shape[1])
    if prod(ref.shape) != (prod(words) if packed else scales.size):
        _refuse(ref, f"shape {list(ref.shape)}, but {list(scales.shape)} scales")
    if packed:
        columns = np.ascontiguousarray(_read(ref, _WORDS).view("<u4").reshape(words).T)
        return unpack_natural(columns, bits)[:, : len(scales)].T - np.float32(1 << (bits - 1))
    return _read(ref, (*_INTEGERS, *FLOATS)).astype(np.float32).reshape(scales.shape)


def _mlx(name: str, table: Table, scheme: Scheme) -> Found | None:
    base = name.removesuffix(".scales")
    if base == name or f"{base}.weight" not in table:
        return None
    words, scales = table[f"{base}.weight"], table[name]
    own = scheme.layers.get(base)
    group = own.get("group_size", scheme.group_size) if isinstance(own, Mapping) else scheme.group_size
    if type(group) is not int or group < 1:
        _refuse(words, f"config.json: quantization: group_size {group!r:.20}, expected a positive number")
    if len(words.shape) == 3 == len(scales.shape):
        _refuse(
            words, "experts that MLX stacks in one tensor are not read; use the checkpoint that they were made from"
        )
    columns = scales.shape[-1] * group if scales.shape else 0
    bits = words.shape[-1] * 32 / columns if columns and words.shape else 0
    fits = len(words.shape) == 2 == len(scales.shape) and words.shape[0] == scales.shape[0]
    if words.dtype != "U32" or not fits or bits not in (2, 3, 4, 5, 6, 8):
        _refuse(
            words,
            f"{words.dtype} {list(words.shape)}, but {list(scales.shape)} scales of groups of {group} want words of "
            "2 to 8 bits",
        )
    biases = _beside(table, name, f"{base}.biases")
    if biases.shape != scales.shape:
        _refuse(biases, f"shape {list(biases.shape)}, but {list(scales.shape)} scales")
    shape, factors, shifts = (words.shape[0], columns), _read(scales), _read(biases)
    group_of = _groups(columns, factors.shape[1])
    scaled = _affine(_words(words, int(bits), columns), factors, None, group_of)
    used = (words.name, name, biases.name)
    return Found(words.name, shape, used, lambda part: scaled(part) + shifts[part][:, group_of])


def _bitsandbytes(name: str, table: Table, scheme: Scheme) -> Found | None:
    if name.endswith(".SCB"):
        return _of_rows(name, table)
    base, found, kind = name.partition(_BNB_STATE)
    if not found:
        return None
    doubly = f"{base}.nested_absmax" in table
    try:
        state = json.loads(bytes(_read(table[name], ("U8",))))
        shape, block = tuple(map(int, state["shape"])), int(state["blocksize"])
        outer_block, shift = (int(state["nested_blocksize"]), float(state["nested_offset"])) if doubly else (1, 0.0)
        if len(shape) != 2 or min(shape) < 1 or not 0 < min(block, outer_block) <= max(block, outer_block) < _END:
            raise ValueError
    except (*_IMPOSSIBLE, RecursionError):
        _refuse(table[name], "not the JSON that bitsandbytes writes of a matrix")
    words, codes, largest = (_beside(table, name, each) for each in (base, f"{base}.quant_map", f"{base}.absmax"))
    count, told = prod(shape), f"{kind} of {list(shape)} in blocks of {block}"
    if words.dtype not in _STORAGE:
        _refuse(words, f"dtype {words.dtype}, expected {', '.join(_STORAGE)}")
    if not 0 <= 2 * words.nbytes - count < 16:  # what is held as larger numbers may be filled up to one
        _refuse(words, f"{words.nbytes} bytes, but {told} has {-(-count // 2)}")
    blocks = -(-count // block)
    scales = _at_least(largest, blocks, told, ("U8",) if doubly else FLOATS)
    if doubly:
        nested = _at_least(_beside(table, name, f"{base}.nested_quant_map"), 256, told)
        outer = _at_least(table[f"{base}.nested_absmax"], -(-blocks // outer_block), told)
        scales = nested[scales] * outer[np.arange(blocks) // outer_block] + np.float32(shift)
    used = (base, name, *(f"{base}.{part}" for part in ("quant_map", "absmax", "nested_absmax", "nested_quant_map")))
    content = MappedFile(words.path).bytes(words.offset, words.nbytes)
    values = partial(_of_blocks, content, _at_least(codes, 16, told), scales, block, shape[1])
    return Found(base, (shape[0], shape[1]), used, values)


def _at_least(ref: TensorRef, count: int, told: str, dtypes: Collection[str] = FLOATS) -> Array:
    """The first `count` numbers of a tensor, flat."""
    if prod(ref.shape) < count:
        _refuse(ref, f"{prod(ref.shape)} numbers, but {told} has {count}")
    return _read(ref, dtypes).reshape(-1)[:count]


def _of_rows(name: str, table: Table) -> Found:
    """A matrix of bitsandbytes' 8 bits, by its scales `name`."""
    base = f"{name.removesuffix('.SCB')}.weight"
    ref, scales = _beside(table, name, base), table[name]
    if ref.dtype != "I8" or len(ref.shape) != 2 or prod(scales.shape) != ref.shape[0]:
        _refuse(ref, f"{ref.dtype} {list(ref.shape)} beside {list(scales.shape)} scales, expected I8 [N, K] and [N]")
    kept = table.get(f"{name.removesuffix('.SCB')}.weight_format")
    if kept is not None and _read(kept, ("U8",)).any():
        _refuse(
            kept,
            "not 0: the numbers are in the order of one kind of GPU; save the model anew, with a later bitsandbytes",
        )
    numbers, factors = _read(ref, ("I8",)), _read(scales).reshape(-1, 1) / np.float32(127)
    made = _affine(lambda rows: numbers[rows], factors, None, np.zeros(ref.shape[1], np.int64))
    return Found(base, (ref.shape[0], ref.shape[1]), (name, base), made)


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
    zeros, scales = (_beside(table, name, f"{base}.{part}") for part in ("qzeros", "scales"))
    group, columns = scheme.group_size, words.shape[-1] * 8 if words.shape else 0
    groups, rest = (1, 0) if group == -1 else divmod(columns, group)
    matrices = {(len(ref.shape), *ref.shape[:1]) for ref in (words, zeros, scales)} == {(2, *words.shape[:1])}
    if not matrices or rest or not groups or zeros.shape[1] * 8 < groups or scales.shape[1] < groups:
        _refuse(
            words,
            f"{list(words.shape)} in groups of {group}, but zero points {list(zeros.shape)} and scales "
            f"{list(scales.shape)}",
        )
    codes, shifts = _words(words, 4, columns), _words(zeros, 4, groups)(slice(None))
    made = _affine(codes, _read(scales)[:, :groups], shifts, _groups(columns, groups))
    return Found(f"{base}.weight", (words.shape[0], columns), (name, zeros.name, scales.name), made)


_FINDERS: dict[str, Callable[[str, Table, Scheme], Found | None]] = {
    "compressed-tensors": _compressed,
    "mlx": _mlx,
    "bitsandbytes": _bitsandbytes,
    "awq_gemv": _awq_gemv,
}
