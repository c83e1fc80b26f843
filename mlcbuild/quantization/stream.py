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
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlcbuild.errors import CheckpointError, MlcBuildError
from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization import asymmetric, floats, group, outer, search
from mlcbuild.quantization.blocks import BadValue, Packed
from mlcbuild.quantization.compiled import Compiled
from mlcbuild.quantization.floats import Array, Float32
from mlcbuild.quantization.schemes import Part, matches, packed, parts_of, quantized_parameters, searchable
from mlcbuild.quantization.sources import Piece, Sources, pieces
from mlcbuild.quantization.tensor_cache import SHARD_BYTES, Announced, Writer
from mlcbuild.recipes.types import Quantization, Weights

_WORTH_COMPILING = 128 << 20  # bytes of source: below, compiling a kernel takes longer than it saves
_AWQ_DTYPES = {"qweight": np.dtype("<u4"), "qzeros": np.dtype("<u4")}


@dataclass(frozen=True)
class _Plan:
    """One parameter: where it comes from, what it becomes.

    `importance` `[K]`, `[experts, K]` for experts, weights the errors of a searched scale; None where all columns count
    the same.
    """

    entry: Mapping[str, Any]  # of parameters.json
    weights: Weights | None
    pieces: tuple[Piece, ...]
    search: bool
    importance: Float32 | None
    dtype: str  # of what is only cast

    @property
    def name(self) -> str:
        return str(self.entry["name"])

    @property
    def matrices(self) -> tuple[int, int, int]:
        """How many matrices it is (experts, or 1), and their N and K. It has two or three axes."""
        *experts, n, k = self.entry["shape"]
        return prod(experts), n, k

    def importance_of(self, piece: Piece) -> Float32 | None:
        """`[K]` for the matrix that the piece is of."""
        if self.importance is None or self.importance.ndim == 1:
            return self.importance
        found: Float32 = self.importance[piece.row // self.matrices[1]]
        return found


def quantize(
    document: Mapping[str, Any],
    blobs: Mapping[str, Path],
    parameters: Sequence[Parameter],
    quantization: Quantization,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    importance: Mapping[str, Array] | None = None,
    note: Callable[[str], None] = lambda text: None,
    scratch: Path | None = None,
) -> None:
    """Write the weights folder of the parameters that `document` (parameters.json) lists.

    `blobs` gives the checkpoint files by sha256; `parameters` the roles, in the same order as the document;
    `progress` is told source bytes done and in all. The output does not depend on `threads`. `importance` is for
    `rounding: calibrated`: by parameter name, `[K]` (`[experts, K]`), how much each input column's squared error counts
    (the mean square of what runs through it); a parameter without one is rounded as by `mse`. `scratch` is a folder for
    kernels that are compiled for this machine; without one everything is done in NumPy, which gives the same bytes.

    Raises CheckpointError naming parameter, tensor, file and index of the first value that is NaN or Inf, or too large
    for the model dtype, and MlcBuildError for an importance that does not fit.
    """
    entries = document["parameters"]
    if [entry["name"] for entry in entries] != [parameter.name for parameter in parameters]:
        raise CheckpointError("parameters.json lists other parameters than the structure has; run convert again")
    quantized_parameters(parameters, quantization)  # refuses a format that cannot be packed before anything is written
    for pattern, _ in quantization.overrides:
        if not any(matches(pattern, parameter) for parameter in parameters):
            note(f"override {pattern!r} matches no parameter of this model")
    weighted = _importance(parameters, quantization, importance)
    plans = [
        _plan(entry, parameter, quantization, weighted.get(parameter.name))
        for entry, parameter in zip(entries, parameters, strict=True)
    ]
    sources = Sources((part for plan in plans for part in _parts(plan, quantization)), blobs)
    total = sum(piece.nbytes for plan in plans for piece in plan.pieces)
    workers = threads or max(1, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as pool, Writer(folder, shard_bytes) as writer:
        kernels = Compiled(scratch, note) if scratch is not None and total >= _WORTH_COMPILING else None
        stream = _Stream(quantization.model_dtype, sources, writer, pool, workers + 2, progress, total, kernels)
        stream.run(plans)
        writer.finish(sum(prod(entry["shape"]) for entry in entries))


def _plan(
    entry: Mapping[str, Any], parameter: Parameter, quantization: Quantization, importance: Float32 | None
) -> _Plan:
    weights = packed(parameter, quantization)
    searched = quantization.rounding != "nearest" and weights is not None and searchable(weights)
    dtype = parameter.dtype or quantization.model_dtype
    return _Plan(entry, weights, pieces(entry, weights is not None), searched, importance if searched else None, dtype)


def _importance(
    parameters: Sequence[Parameter], quantization: Quantization, given: Mapping[str, Array] | None
) -> dict[str, Float32]:
    if quantization.rounding != "calibrated":
        return {}
    if given is None:
        raise MlcBuildError("rounding: calibrated needs the importance of each layer's inputs, and none was measured")
    shapes = {parameter.name: parameter.shape for parameter in parameters}
    checked = {}
    for name, values in given.items():
        if name not in shapes:
            raise MlcBuildError(f"importance of {name}: the model has no such parameter; measure it again")
        if values.shape != shapes[name][:-2] + shapes[name][-1:]:
            raise MlcBuildError(
                f"importance of {name}: shape {list(values.shape)}, but the parameter is {list(shapes[name])}"
            )
        checked[name] = values.astype(np.float32, copy=False)
        if not (np.isfinite(checked[name]).all() and (checked[name] >= 0).all()):
            raise MlcBuildError(f"importance of {name}: expected finite numbers, none below 0; measure it again")
    return checked


def _parts(plan: _Plan, quantization: Quantization) -> Iterable[Mapping[str, Any]]:
    """The parts of parameters.json that are read for this parameter."""
    if plan.weights is None or plan.weights.scheme != "awq":
        return plan.entry["parts"]  # type: ignore[no-any-return]
    ready = plan.entry.get("packed")
    where = f"parameter {plan.name}: {quantization.name or 'this quantization'}"
    if ready is None or ready["scheme"] != "awq":
        raise CheckpointError(
            f"{where} takes weights as AutoAWQ packed them, and the checkpoint's are not; choose another quantization"
        )
    if ready["group_size"] != plan.weights.group_size:
        raise CheckpointError(
            f"{where} has group_size {plan.weights.group_size}, the checkpoint was packed with {ready['group_size']}; "
            f"make a quantization with that group_size"
        )
    return [part for tensor in ready["tensors"].values() for part in tensor]


class _Stream:
    """One conversion under way."""

    def __init__(
        self,
        model_dtype: str,
        sources: Sources,
        writer: Writer,
        pool: ThreadPoolExecutor,
        ahead: int,
        progress: Callable[[int, int], None],
        total: int,
        kernels: Compiled | None,
    ) -> None:
        self._model_dtype = model_dtype
        self._sources = sources
        self._writer = writer
        self._pool = pool
        self._ahead = ahead
        self._progress = progress
        self._total = total
        self._done = 0
        self._encode = kernels.encode if kernels else group.encode

    def run(self, plans: Sequence[_Plan]) -> None:
        """Write all parameters. Those that need their whole matrix first are left out of the common queue."""
        apart = {"minmax_outer": self._write_outer, "awq": self._write_awq}
        queued = [plan for plan in plans if plan.weights is None or plan.weights.scheme not in apart]
        results = self._in_order(self._convert, ((plan, piece) for plan in queued for piece in plan.pieces))
        for plan in plans:
            if plan.weights is None:
                self._write_values(plan, self._arrived(plan, results))
            elif plan.weights.scheme in apart:
                apart[plan.weights.scheme](plan, plan.weights)
            else:
                self._write_groups(plan, plan.weights, self._arrived(plan, results))

    def _in_order(self, work: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Results in the order of `tasks`, with a few of them under way or waiting."""
        waiting: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(work, *task))
                if len(waiting) >= self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _arrived(self, plan: _Plan, results: Iterator[Any]) -> Iterator[Any]:
        """The results of one parameter's pieces, from the queue of all."""
        for piece in plan.pieces:
            try:
                result = next(results)
            except BadValue as bad:
                raise CheckpointError(self._sources.explain(plan.name, piece, bad)) from None
            yield result
            self._advance(piece.nbytes)

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress(self._done, self._total)

    def _convert(self, plan: _Plan, piece: Piece) -> Packed | Array:
        """The piece packed, or cast to the model dtype. Raises BadValue."""
        weights, dtype = plan.weights, self._model_dtype
        if weights is None:
            values = self._checked(piece, plan.dtype)
            result: Packed | Array = floats.cast(values, piece.dtype, plan.dtype)
            if result is values:
                result = values.copy()  # the mapped pages are about to be given back
        elif not weights.symmetric:
            result = asymmetric.encode(self._sources.rows(piece), piece.dtype, weights)
        elif plan.search:
            result = search.encode(self._sources.rows(piece), piece.dtype, weights, dtype, plan.importance_of(piece))
        else:
            result = self._encode(self._sources.rows(piece), piece.dtype, weights, dtype)
        self._sources.release(piece)
        return result

    def _checked(self, piece: Piece, dtype: str) -> Array:
        values = self._sources.values(piece)
        bad = floats.first_bad(values, piece.dtype, dtype)
        if bad is not None:
            raise BadValue(bad, dtype)
        return values

    def _write_values(self, plan: _Plan, results: Iterator[Array]) -> None:
        short = plan.dtype == "float32" and self._survives_bfloat16(plan)
        self._begin(plan.name, tuple(plan.entry["shape"]), plan.dtype, short)
        for values in results:
            self._writer.write(_upper_halves(values) if short else values)

    def _write_groups(self, plan: _Plan, weights: Weights, results: Iterator[Packed]) -> None:
        """Words, then scales: NK words go out as they come; KN words are all needed before the first row.

        Experts, which are NK, go through as one matrix.
        """
        first, second = parts_of(tuple(plan.entry["shape"]), weights, self._model_dtype)
        prefix = plan.name.removesuffix("weight")
        all_rows = (-1, second.shape[-1])
        scales = np.empty(second.shape, floats.STORAGE.get(second.dtype, second.dtype)).reshape(all_rows)
        row = 0
        if weights.layout == "KN":
            words = np.empty(first.shape, first.dtype)
            for result in results:
                end = row + len(result.words)
                words[:, row:end] = result.words.T
                scales[:, row:end] = result.scales.T
                row = end
            self._begin(prefix + first.form, first.shape, first.dtype)
            self._writer.write(words)
        else:
            self._begin(prefix + first.form, first.shape, first.dtype)
            for result in results:
                end = row + len(result.words)
                self._writer.write(result.words)
                scales[row:end] = result.scales
                row = end
        short = second.dtype == "float32" and floats.is_bfloat16(scales)
        self._begin(prefix + second.form, second.shape, second.dtype, short)
        self._writer.write(_upper_halves(scales) if short else scales)

    def _write_outer(self, plan: _Plan, weights: Weights) -> None:
        """Each matrix is gone through three times: twice for its ranges, once for its codes."""
        dtype = self._model_dtype
        made = parts_of(tuple(plan.entry["shape"]), weights, dtype)
        experts, n, k = plan.matrices
        prefix = plan.name.removesuffix("weight")
        self._begin(prefix + made[0].form, made[0].shape, made[0].dtype)
        vectors = [np.empty((experts, part.shape[-1]), floats.STORAGE[part.dtype]) for part in made[1:]]
        transposed = weights.layout == "KN"
        codes = np.empty((k, n) if transposed else (n, k), np.uint8)
        for expert in range(experts):
            mine = [piece for piece in plan.pieces if piece.row // n == expert]
            through = partial(self._through, plan, mine, expert * n)
            found = outer.ranges(n, k, through)
            for of_all, mine_of_it in zip(vectors, found.stored(dtype), strict=True):
                of_all[expert] = mine_of_it
            if any(floats.first_bad(of_all[expert], dtype, dtype) is not None for of_all in vectors):
                raise CheckpointError(
                    f"{mine[0].part['file']}: parameter {plan.name}: its values are too far apart for ranges in "
                    f"{dtype}; choose another quantization"
                )
            for piece, rows in zip(mine, through(partial(outer.encode, found=found)), strict=True):
                span = slice(piece.row - expert * n, piece.row - expert * n + len(rows))
                codes[(slice(None), span) if transposed else span] = rows.T if transposed else rows
                self._advance(piece.nbytes)
            self._writer.write(codes)
        for part, values in zip(made[1:], vectors, strict=True):
            self._begin(prefix + part.form, part.shape, part.dtype)
            self._writer.write(values)

    def _through(
        self, plan: _Plan, pieces: Sequence[Piece], first: int, work: Callable[[Float32, int], Array]
    ) -> Iterator[Array]:
        """`work` on the rows of a matrix, which begins with the parameter's row `first`, and their number in it."""

        def on(piece: Piece) -> Array:
            values = floats.widen(self._checked(piece, self._model_dtype), piece.dtype).reshape(-1, piece.width)
            result = work(values, piece.row - first)
            self._sources.release(piece)
            return result

        results = self._in_order(on, ((piece,) for piece in pieces))
        for piece in pieces:
            try:
                yield next(results)
            except BadValue as bad:
                raise CheckpointError(self._sources.explain(plan.name, piece, bad)) from None

    def _write_awq(self, plan: _Plan, weights: Weights) -> None:
        """The checkpoint's own words; those of a joined parameter side by side, since its rows are columns here."""
        prefix = plan.name.removesuffix("weight")
        tensors = plan.entry["packed"]["tensors"]
        experts, *_ = plan.matrices
        for part in parts_of(tuple(plan.entry["shape"]), weights, self._model_dtype):
            self._begin(prefix + part.form, part.shape, part.dtype)
            given = tensors[part.form]
            each = len(given) // experts  # tensors of one expert
            for start in range(0, len(given), each):
                self._write_joined(plan, part, given[start : start + each])
        self._advance(sum(piece.nbytes for piece in plan.pieces))

    def _write_joined(self, plan: _Plan, part: Part, given: Sequence[Mapping[str, Any]]) -> None:
        joined = [self._awq_tensor(plan, source, _AWQ_DTYPES.get(part.form)) for source in given]
        rows, columns = part.shape[-2:]
        step = max(1, (1 << 20) // columns)
        for start in range(0, rows, step):
            self._writer.write(np.concatenate([values[start : start + step] for values in joined], axis=1))
        for source in given:
            self._sources.release_part(source)

    def _awq_tensor(self, plan: _Plan, source: Mapping[str, Any], dtype: np.dtype[Any] | None) -> Array:
        if dtype is not None:
            return self._sources.raw(source, dtype)
        scales = self._sources.raw(source, floats.STORAGE[source["dtype"]])
        bad = floats.first_bad(scales, source["dtype"], self._model_dtype)
        if bad is not None:
            raise CheckpointError(
                f"{source['file']}: tensor {source['tensor']} (parameter {plan.name}): a scale is not finite in "
                f"{self._model_dtype}; the checkpoint is damaged"
            )
        return floats.cast(scales, source["dtype"], self._model_dtype)

    def _begin(self, name: str, shape: tuple[int, ...], dtype: str, short: bool = False) -> None:
        self._writer.begin(Announced(name, shape, dtype, "f32-to-bf16" if short else "raw"))

    def _survives_bfloat16(self, plan: _Plan) -> bool:
        """Whether every value, as float32, has 16 zero low bits. Stops at the first that has not."""
        return all(
            piece.dtype == "bfloat16" or floats.is_bfloat16(floats.widen(self._sources.values(piece), piece.dtype))
            for piece in plan.pieces
        )


def _upper_halves(values: Array) -> Array:
    return np.ascontiguousarray(values.reshape(-1).view(np.uint16)[1::2])
