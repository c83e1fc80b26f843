"""From an index of parameters to a weights folder, a piece at a time.

Pieces of about a million elements are packed by a few threads (NumPy lets go of the interpreter while it computes) and
written in order by the calling thread, which also hashes. What is in memory is the pieces in flight, the scales of the
matrix being written (for the KN layout: that whole packed matrix), and nothing else: sources are mapped, and given
back once read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlcbuild import host
from mlcbuild.errors import CheckpointError, MlcBuildError
from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization import asymmetric, floats, group, outer, search
from mlcbuild.quantization.compiled import Compiled
from mlcbuild.quantization.floats import Array, BadValue, Float32
from mlcbuild.quantization.packing import Packed
from mlcbuild.quantization.schemes import QuantizedParameter, matches, quantized_parameters, searchable
from mlcbuild.quantization.sources import Part, Piece, Sources, pieces
from mlcbuild.quantization.tensor_cache import SHARD_BYTES, Announced, Writer
from mlcbuild.recipes.types import Quantization, Weights

_WORTH_COMPILING = 128 << 20  # bytes of source: below, compiling a kernel takes longer than it saves


@dataclass(frozen=True)
class _Plan:
    """One parameter: where it comes from, what it becomes.

    `weights` is how it is packed, None where it is only cast. `importance` `[K]`, `[experts, K]` for experts, weights
    the errors of a searched scale; None where all columns count the same. `ready` is all of it, where that was found
    before.
    """

    entry: Mapping[str, Any]  # of parameters.json
    tensors: tuple[QuantizedParameter, ...]
    weights: Weights | None
    pieces: tuple[Piece, ...]
    search: bool
    importance: Float32 | None
    ready: Packed | None

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
    ready: Mapping[str, Packed] | None = None,
) -> None:
    """Write the weights folder of the parameters that `document` (parameters.json) lists.

    `blobs` gives the checkpoint files by sha256; `parameters` the roles, in the same order as the document;
    `progress` is told source bytes done and in all. The output does not depend on `threads`. `importance` is for
    `rounding: calibrated`: by parameter name, `[K]` (`[experts, K]`), how much each input column's squared error counts
    (the mean square of what runs through it); a parameter without one is rounded as by `mse`. `ready` is for `rounding:
    gptq`: what parameters are packed to, by name, the rows of experts one after the other. `scratch` is a folder for
    kernels that are compiled for this machine; without one everything is done in NumPy, which gives the same bytes.

    Raises CheckpointError naming parameter, tensor, file and index of the first value that is NaN or Inf, or too large
    for the model dtype, and MlcBuildError for an importance that does not fit.
    """
    entries = document["parameters"]
    if [entry["name"] for entry in entries] != [parameter.name for parameter in parameters]:
        raise CheckpointError("parameters.json lists other parameters than the structure has; run convert again")
    made: dict[
        str, list[QuantizedParameter]
    ] = {}  # a format that cannot be packed is refused before anything is written
    for tensor in quantized_parameters(parameters, quantization):
        made.setdefault(tensor.source, []).append(tensor)
    for pattern, _ in quantization.overrides:
        if not any(matches(pattern, parameter) for parameter in parameters):
            note(f"override {pattern!r} matches no parameter of this model")
    weighted = _importance(parameters, quantization, importance)
    done = _ready(made, quantization, ready)
    plans = [
        _plan(entry, made[entry["name"]], quantization, weighted.get(entry["name"]), done.get(entry["name"]))
        for entry in entries
    ]
    sources = Sources((part for plan in plans for part in _parts(plan, quantization)), blobs)
    total = sum(piece.nbytes for plan in plans for piece in plan.pieces)
    workers = threads or max(1, len(host.processors()))
    with ThreadPoolExecutor(workers) as pool, Writer(folder, shard_bytes) as writer:
        encode = Compiled(scratch, note).encode if scratch and total >= _WORTH_COMPILING else group.encode
        _Stream(quantization.model_dtype, sources, writer, pool, workers + 2, progress, total, encode).run(plans)
        writer.finish(sum(prod(entry["shape"]) for entry in entries))


def _plan(
    entry: Mapping[str, Any],
    tensors: Sequence[QuantizedParameter],
    quantization: Quantization,
    importance: Float32 | None,
    ready: Packed | None,
) -> _Plan:
    weights = tensors[0].weights
    searched = quantization.rounding != "nearest" and weights is not None and searchable(weights)
    mine = pieces(entry, weights is not None)
    return _Plan(entry, tuple(tensors), weights, mine, searched, importance if searched else None, ready)


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


def _ready(
    made: Mapping[str, Sequence[QuantizedParameter]], quantization: Quantization, given: Mapping[str, Packed] | None
) -> dict[str, Packed]:
    if quantization.rounding != "gptq":
        return {}
    if given is None:
        raise MlcBuildError("rounding: gptq takes matrices that were rounded layer by layer, and none were")
    for name, each in given.items():
        if name not in made:
            raise MlcBuildError(f"rounded {name}: the model has no such parameter; round it again")
        for values, tensor in zip((each.words, each.scales), made[name], strict=True):
            *experts, n, k = tensor.shape
            expected = (k, n) if tensor.rows_axis == 1 and not experts else (prod(tensor.shape[:-1]), k)
            if values.shape != expected:
                raise MlcBuildError(f"rounded {name}: shape {list(values.shape)}, expected {list(expected)}")
    return dict(given)


def _parts(plan: _Plan, quantization: Quantization) -> Iterable[Part]:
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


@dataclass
class _Stream:
    """One conversion under way: `done` source bytes of `total`, with up to `ahead` pieces at work or waiting."""

    model_dtype: str
    sources: Sources
    writer: Writer
    pool: ThreadPoolExecutor
    ahead: int
    progress: Callable[[int, int], None]
    total: int
    encode: Callable[[Array, str, Weights, str], Packed]  # of symmetric groups
    done: int = 0

    def run(self, plans: Sequence[_Plan]) -> None:
        """Write all parameters. Those that need their whole matrix first are left out of the common queue."""
        apart = {"minmax_outer": self._write_outer, "awq": self._write_awq}
        queued = [plan for plan in plans if plan.weights is None or plan.weights.scheme not in apart]
        results = self._in_order(self._convert, ((plan, piece) for plan in queued for piece in plan.pieces))
        for plan in plans:
            if plan.weights is None:
                self._write_values(plan, self._arrived(plan, results))
            elif plan.weights.scheme in apart:
                apart[plan.weights.scheme](plan)
            else:
                self._write_groups(plan, plan.weights, self._arrived(plan, results))

    def _in_order(self, work: Callable[[_Plan, Piece], Any], tasks: Iterable[tuple[_Plan, Piece]]) -> Iterator[Any]:
        """Results in the order of `tasks`, with a few of them under way or waiting."""
        waiting: deque[tuple[_Plan, Piece, Future[Any]]] = deque()

        def first() -> Any:
            plan, piece, future = waiting.popleft()
            try:
                return future.result()
            except BadValue as bad:
                raise CheckpointError(self.sources.explain(plan.name, piece, bad)) from None

        try:
            for plan, piece in tasks:
                waiting.append((plan, piece, self.pool.submit(work, plan, piece)))
                if len(waiting) >= self.ahead:
                    yield first()
            while waiting:
                yield first()
        finally:
            for _, _, future in waiting:
                future.cancel()

    def _arrived(self, plan: _Plan, results: Iterator[Any]) -> Iterator[Any]:
        """The results of one parameter's pieces, from the queue of all."""
        for piece, result in zip(plan.pieces, results, strict=False):
            yield result
            self._advance(piece.nbytes)

    def _advance(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress(self.done, self.total)

    def _convert(self, plan: _Plan, piece: Piece) -> Packed | Array:
        """The piece packed, or cast to the model dtype. Raises BadValue."""
        weights, dtype = plan.weights, self.model_dtype
        if weights is None:
            target = plan.tensors[0].dtype
            values = self._checked(piece, target)
            result: Packed | Array = floats.cast(values, piece.dtype, target)
            if result is values:
                result = values.copy()  # the mapped pages are about to be given back
        elif plan.ready is not None:
            self._checked(piece, dtype)
            rows = slice(piece.row, piece.row + piece.count // piece.width)
            result = Packed(plan.ready.words[rows], plan.ready.scales[rows])
        elif not weights.symmetric:
            result = asymmetric.encode(self.sources.rows(piece), piece.dtype, weights)
        elif plan.search:
            result = search.encode(self.sources.rows(piece), piece.dtype, weights, dtype, plan.importance_of(piece))
        else:
            result = self.encode(self.sources.rows(piece), piece.dtype, weights, dtype)
        self.sources.release(piece)
        return result

    def _checked(self, piece: Piece, dtype: str) -> Array:
        values = self.sources.values(piece)
        floats.check(values, piece.dtype, dtype)
        return values

    def _write_values(self, plan: _Plan, results: Iterator[Array]) -> None:
        (tensor,) = plan.tensors
        # Whether every value, as float32, has 16 zero low bits; stops at the first that has not.
        short = tensor.dtype == "float32" and all(
            piece.dtype == "bfloat16" or floats.is_bfloat16(floats.widen(self.sources.values(piece), piece.dtype))
            for piece in plan.pieces
        )
        self._begin(tensor, short)
        for values in results:
            self.writer.write(_upper_halves(values) if short else values)

    def _write_groups(self, plan: _Plan, weights: Weights, results: Iterator[Packed]) -> None:
        """Words, then scales: NK words go out as they come; KN words are all needed before the first row.

        Experts, which are NK, go through as one matrix.
        """
        first, second = plan.tensors
        scales = np.empty(second.shape, floats.STORAGE.get(second.dtype, second.dtype)).reshape(-1, second.shape[-1])
        words = np.empty(first.shape, first.dtype) if weights.layout == "KN" else None
        self._begin(first)
        row = 0
        for result in results:
            span = slice(row, row + len(result.words))
            if words is None:
                self.writer.write(result.words)
                scales[span] = result.scales
            else:
                words[:, span] = result.words.T
                scales[:, span] = result.scales.T
            row = span.stop
        if words is not None:
            self.writer.write(words)
        short = second.dtype == "float32" and floats.is_bfloat16(scales)
        self._begin(second, short)
        self.writer.write(_upper_halves(scales) if short else scales)

    def _write_outer(self, plan: _Plan) -> None:
        """Each matrix is gone through three times: twice for its ranges, once for its codes."""
        dtype, (packed, *rest) = self.model_dtype, plan.tensors
        experts, n, k = plan.matrices
        vectors = [np.empty((experts, tensor.shape[-1]), floats.STORAGE[tensor.dtype]) for tensor in rest]
        codes = np.empty(packed.shape[-2:], np.uint8)
        rows_of = codes.T if packed.rows_axis == len(packed.shape) - 1 else codes  # [n, k]
        self._begin(packed)
        for expert in range(experts):
            mine = [piece for piece in plan.pieces if piece.row // n == expert]
            through = partial(self._through, plan, mine, expert * n)
            found = outer.ranges(n, k, through)
            for of_all, of_this in zip(vectors, found.stored(dtype), strict=True):
                of_all[expert] = of_this
            if any(floats.first_bad(of_all[expert], dtype, dtype) is not None for of_all in vectors):
                raise CheckpointError(
                    f"{mine[0].part['file']}: parameter {plan.name}: its values are too far apart for ranges in "
                    f"{dtype}; choose another quantization"
                )
            for piece, rows in zip(mine, through(partial(outer.encode, found=found)), strict=True):
                rows_of[piece.row - expert * n :][: len(rows)] = rows
                self._advance(piece.nbytes)
            self.writer.write(codes)
        for tensor, values in zip(rest, vectors, strict=True):
            self._begin(tensor)
            self.writer.write(values)

    def _through(
        self, plan: _Plan, pieces: Sequence[Piece], first: int, work: Callable[[Float32, int], Array]
    ) -> Iterator[Array]:
        """`work` on the rows of a matrix, which begins with the parameter's row `first`, and their number in it."""

        def on(_: _Plan, piece: Piece) -> Array:
            values = floats.widen(self._checked(piece, self.model_dtype), piece.dtype).reshape(-1, piece.width)
            result = work(values, piece.row - first)
            self.sources.release(piece)
            return result

        return self._in_order(on, ((plan, piece) for piece in pieces))

    def _write_awq(self, plan: _Plan) -> None:
        """The checkpoint's own words; those of a joined parameter side by side, since its rows are columns here."""
        experts, *_ = plan.matrices
        for tensor in plan.tensors:
            self._begin(tensor)
            given = plan.entry["packed"]["tensors"][tensor.form]
            each = len(given) // experts  # tensors of one expert
            for start in range(0, len(given), each):
                self._write_joined(plan, tensor, given[start : start + each])
        self._advance(sum(piece.nbytes for piece in plan.pieces))

    def _write_joined(self, plan: _Plan, tensor: QuantizedParameter, given: Sequence[Part]) -> None:
        joined = [self._awq_tensor(plan, source, tensor.form) for source in given]
        rows, columns = tensor.shape[-2:]
        step = max(1, (1 << 20) // columns)
        for start in range(0, rows, step):
            self.writer.write(np.concatenate([values[start : start + step] for values in joined], axis=1))
        for source in given:
            self.sources.release_part(source)

    def _awq_tensor(self, plan: _Plan, source: Part, form: str) -> Array:
        if form != "scales":
            return self.sources.raw(source, np.dtype("<u4"))
        scales = self.sources.raw(source, floats.STORAGE[source["dtype"]])
        if floats.first_bad(scales, source["dtype"], self.model_dtype) is not None:
            raise CheckpointError(
                f"{source['file']}: tensor {source['tensor']} (parameter {plan.name}): a scale is not finite in "
                f"{self.model_dtype}; the checkpoint is damaged"
            )
        return floats.cast(scales, source["dtype"], self.model_dtype)

    def _begin(self, tensor: QuantizedParameter, short: bool = False) -> None:
        self.writer.begin(Announced(tensor.name, tensor.shape, tensor.dtype, "f32-to-bf16" if short else "raw"))


def _upper_halves(values: Array) -> Array:
    return np.ascontiguousarray(values.reshape(-1).view(np.uint16)[1::2])
