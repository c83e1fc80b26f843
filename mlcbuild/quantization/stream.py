"""From an index of parameters to a weights folder, a piece at a time.

Pieces of about a million elements are packed by a few threads (NumPy lets go of the interpreter while it computes) and
written in order by the calling thread, which also hashes. What is in memory is the pieces in flight, the scales of the
matrix being written (for the KN layout: that whole packed matrix), and nothing else: sources are mapped, and given
back once read.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlcbuild.checkpoints.mapped import STORAGE, MappedFile
from mlcbuild.errors import CheckpointError
from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization import floats, group
from mlcbuild.quantization.floats import Array
from mlcbuild.quantization.schemes import packed, packed_shapes, quantized_parameters
from mlcbuild.quantization.tensor_cache import SHARD_BYTES, Announced, Writer
from mlcbuild.recipes.types import Quantization, Weights

_PIECE = 1 << 20  # elements that one task reads


@dataclass(frozen=True)
class _Piece:
    """`count` elements of a parameter from `start` within `part`; `width` is K of a packed matrix, else 1."""

    part: Mapping[str, Any]
    dtype: str
    start: int
    count: int
    width: int

    @property
    def nbytes(self) -> int:
        return self.count * STORAGE[self.dtype].itemsize


@dataclass(frozen=True)
class _Plan:
    """One parameter: where it comes from, what it becomes."""

    entry: Mapping[str, Any]  # of parameters.json
    weights: Weights | None
    pieces: tuple[_Piece, ...]


def quantize(
    document: Mapping[str, Any],
    blobs: Mapping[str, Path],
    parameters: Sequence[Parameter],
    quantization: Quantization,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the weights folder of the parameters that `document` (parameters.json) lists.

    `blobs` gives the checkpoint files by sha256; `parameters` the roles, in the same order as the document;
    `progress` is told source bytes done and in all. The output does not depend on `threads`. Raises CheckpointError
    naming parameter, tensor, file and index of the first value that is NaN or Inf, or too large for the model dtype.
    """
    entries = document["parameters"]
    if [entry["name"] for entry in entries] != [parameter.name for parameter in parameters]:
        raise CheckpointError("parameters.json lists other parameters than the structure has; run convert again")
    quantized_parameters(parameters, quantization)  # refuses a format that cannot be packed before anything is written
    files = {digest: MappedFile(blobs[digest]) for digest in _used_blobs(entries, blobs)}
    plans = [
        _plan(entry, packed(parameter, quantization)) for entry, parameter in zip(entries, parameters, strict=True)
    ]
    total = sum(part["nbytes"] for entry in entries for part in entry["parts"])
    done = 0

    def work(plan: _Plan, piece: _Piece) -> group.Packed | Array:
        return _convert(piece, files, plan.weights, quantization.model_dtype)

    workers = threads or max(1, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as pool, Writer(folder, shard_bytes) as writer:
        tasks = ((plan, piece) for plan in plans for piece in plan.pieces)
        results = _in_order(pool, work, tasks, workers + 2)

        def arrived(plan: _Plan) -> Iterator[Any]:
            nonlocal done
            for piece in plan.pieces:
                try:
                    result = next(results)
                except group.BadValue as bad:
                    raise CheckpointError(_bad_value(plan, piece, bad.index, files, quantization.model_dtype)) from None
                yield result
                done += piece.nbytes
                progress(done, total)

        for plan in plans:
            if plan.weights is None:
                _write_values(writer, plan, arrived(plan), files, quantization.model_dtype)
            else:
                _write_packed(writer, plan, plan.weights, arrived(plan), quantization.model_dtype)
        writer.finish(sum(prod(entry["shape"]) for entry in entries))


def _used_blobs(entries: Iterable[Mapping[str, Any]], blobs: Mapping[str, Path]) -> dict[str, None]:
    used = {part["blob"]: part["file"] for entry in entries for part in entry["parts"]}
    for digest, file in used.items():
        if digest not in blobs:
            raise CheckpointError(f"{file}: the checkpoint's file is gone (sha256 {digest}); run download again")
    return dict.fromkeys(used)


def _plan(entry: Mapping[str, Any], weights: Weights | None) -> _Plan:
    width = entry["shape"][-1] if weights is not None else 1
    step = max(1, _PIECE // width) * width
    pieces = tuple(
        _Piece(part, entry["dtype"], start, min(step, size - start), width)
        for part in entry["parts"]
        for size in [prod(part["shape"])]
        for start in range(0, size, step)
    )
    return _Plan(entry, weights, pieces)


def _convert(
    piece: _Piece, files: Mapping[str, MappedFile], weights: Weights | None, model_dtype: str
) -> group.Packed | Array:
    """The piece packed, or cast to the model dtype. Raises group.BadValue."""
    values = _view(piece, files)
    if weights is not None:
        result: group.Packed | Array = group.encode(values.reshape(-1, piece.width), piece.dtype, weights, model_dtype)
    else:
        bad = floats.first_bad(values, piece.dtype, model_dtype)
        if bad is not None:
            raise group.BadValue(bad)
        result = floats.cast(values, piece.dtype, model_dtype)
        if result is values:
            result = values.copy()  # the mapped pages are about to be given back
    offset = piece.part["offset"] + piece.start * STORAGE[piece.dtype].itemsize
    files[piece.part["blob"]].release(offset, piece.nbytes)
    return result


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], ahead: int
) -> Iterator[Any]:
    """Results in the order of `tasks`, with at most `ahead` of them under way or waiting."""
    waiting: deque[Future[Any]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(work, *task))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _write_values(
    writer: Writer, plan: _Plan, results: Iterator[Array], files: Mapping[str, MappedFile], model_dtype: str
) -> None:
    entry = plan.entry
    short = model_dtype == "float32" and _survives_bfloat16(plan, files)
    announced = Announced(entry["name"], tuple(entry["shape"]), model_dtype, "f32-to-bf16" if short else "raw")
    writer.begin(announced)
    for values in results:
        writer.write(_upper_halves(values) if short else values)


def _write_packed(
    writer: Writer, plan: _Plan, weights: Weights, results: Iterator[group.Packed], model_dtype: str
) -> None:
    """`x.q_weight`, then `x.q_scale`: NK words go out as they come; KN words are all needed before the first row."""
    n, k = plan.entry["shape"]
    prefix = plan.entry["name"].removesuffix("weight")
    words_shape, scales_shape = packed_shapes(n, k, weights)
    announced = Announced(f"{prefix}q_weight", words_shape, weights.storage_dtype)
    scales = np.empty(scales_shape, floats.STORAGE[model_dtype])
    row = 0
    if weights.layout == "KN":
        words = np.empty(words_shape, weights.storage_dtype)
        for result in results:
            end = row + len(result.words)
            words[:, row:end] = result.words.T
            scales[:, row:end] = result.scales.T
            row = end
        writer.begin(announced)
        writer.write(words)
    else:
        writer.begin(announced)
        for result in results:
            end = row + len(result.words)
            writer.write(result.words)
            scales[row:end] = result.scales
            row = end
    short = model_dtype == "float32" and floats.is_bfloat16(scales)
    writer.begin(Announced(f"{prefix}q_scale", scales_shape, model_dtype, "f32-to-bf16" if short else "raw"))
    writer.write(_upper_halves(scales) if short else scales)


def _survives_bfloat16(plan: _Plan, files: Mapping[str, MappedFile]) -> bool:
    """Whether every value of the parameter, as float32, has 16 zero low bits. Stops at the first that has not."""
    return all(
        piece.dtype == "bfloat16" or floats.is_bfloat16(floats.widen(_view(piece, files), piece.dtype))
        for piece in plan.pieces
    )


def _upper_halves(values: Array) -> Array:
    return np.ascontiguousarray(values.reshape(-1).view(np.uint16)[1::2])


def _view(piece: _Piece, files: Mapping[str, MappedFile]) -> Array:
    offset = piece.part["offset"] + piece.start * STORAGE[piece.dtype].itemsize
    return files[piece.part["blob"]].view(offset, piece.count, piece.dtype)


def _bad_value(plan: _Plan, piece: _Piece, bad: int, files: Mapping[str, MappedFile], model_dtype: str) -> str:
    part = piece.part
    value = floats.widen(_view(piece, files)[bad : bad + 1], piece.dtype)[0]
    position = ", ".join(str(axis) for axis in np.unravel_index(piece.start + bad, part["shape"]))
    where = f"{part['file']}: tensor {part['tensor']} (parameter {plan.entry['name']})"
    if np.isnan(value):
        return f"{where}: NaN at [{position}]; the checkpoint is damaged"
    if np.isinf(value):
        return f"{where}: {'-' if value < 0 else ''}Inf at [{position}]; the checkpoint is damaged"
    return (
        f"{where}: {value:g} at [{position}] is too large for {model_dtype}; "
        "use a quantization whose model_dtype is float32"
    )
