"""A compiled model library: opened, described by its `_metadata`, and checked against weights before anything runs.

CONTRACT: a Relax VM module whose functions take the parameters as one tuple, last, in `_metadata.params` order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import tvm_runtime
from mlcbuild.runtime.device import GPUS, Device

CACHE, STATE = "create_tir_paged_kv_cache", "create_rnn_state"
CREATE = {"kv_cache": (CACHE,), "rnn_state": (STATE,), "hybrid": (CACHE, STATE)}  # the state, by kv_state_kind
_POOLED_ALLOCATOR = 2  # AllocatorType kPooled of TVM's memory manager
_WANTED_RUNTIME = re.compile(r"created using \{(\w+)\}")  # TVM of a library whose device's runtime is not loaded


class Described(Protocol):
    """What a library and a weights folder both say of a tensor."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[Any, ...]: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class LibraryParameter:
    """A parameter as the library wants it; a dimension that it leaves open is a name, such as `vocab_size`."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class Metadata:
    """A library's `_metadata`, with MLC's defaults for what older libraries leave out. -1 means no limit, or none."""

    model_type: str
    quantization: str
    context_window_size: int
    sliding_window_size: int
    attention_sink_size: int
    prefill_chunk_size: int
    max_batch_size: int
    kv_state_kind: str
    model_task: str
    parameters: tuple[LibraryParameter, ...]
    embedding: Mapping[str, Any] | None = None  # `embedding_metadata`: model_type, pooling_strategy, normalize


class Library:
    """An opened library. Its functions are called by name: `library["decode"](...)`."""

    def __init__(self, path: Path, device: Device | None = None) -> None:
        """Open `path` for `device` (default: the one that it was built for).

        Raises MlcBuildError where it is no library for this machine, or not a model's.
        """
        self.path = path
        module = _open(path)
        self.device = Device(next((kind for kind in _kinds(module) if kind in GPUS), "cpu"))
        if device not in (None, self.device):
            raise MlcBuildError(f"{path}: a library for `{self.device.kind}` cannot run on the device `{device.kind}`")
        self.device.start()
        devices = dict.fromkeys([self.device.number, Device().number])
        try:
            self._module = module["vm_load_executable"]()
            self._module["vm_initialization"](*(value for n in devices for value in (n, 0, _POOLED_ALLOCATOR)))
        except (RuntimeError, AttributeError, KeyError) as error:
            raise _foreign(path, error) from error
        if not self.has("_metadata"):
            raise MlcBuildError(f"{path}: no `_metadata` function, so this is not a library of a language model")
        self.metadata = parse_metadata(str(self["_metadata"]()), path)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        function: Callable[..., Any] = self._module.get_function(name, query_imports=True)
        return function

    def has(self, name: str) -> bool:
        return bool(self._module.implements_function(name, query_imports=True))


@dataclass(frozen=True)
class Network:
    """A library with parameters that fit it: what a session computes with."""

    library: Library
    parameters: Any  # a TVM array of tensors in `_metadata.params` order
    vocab_size: int
    threads: int


def _open(path: Path) -> Any:
    """The module in `path`, with the runtime of the device that it was built for."""
    import tvm_ffi

    tvm_runtime.start()
    for started in (False, True):
        try:
            module = tvm_ffi.load_module(str(path.absolute()))
            module["vm_load_executable"]  # what a model's library has
            return module
        except (RuntimeError, AttributeError, KeyError) as error:
            wanted = _WANTED_RUNTIME.search(str(error))
            if started or wanted is None or wanted[1] not in GPUS:
                raise _foreign(path, error) from error
            Device(wanted[1]).start()
    raise AssertionError("the second try either returns or raises")


def _foreign(path: Path, error: BaseException) -> MlcBuildError:
    reason = _last_line(error)
    return MlcBuildError(
        f"{path}: this machine cannot load it as a model library ({reason}); was it built for another target?"
    )


def _kinds(module: Any) -> Iterator[str]:
    """The kinds of the modules that a library is made of, such as `cuda`."""
    yield module.kind
    for imported in module.imports:
        yield from _kinds(imported)


def parse_metadata(text: str, path: Path) -> Metadata:
    """`_metadata`'s JSON. Raises MlcBuildError where a field that this runtime needs is missing or unsupported."""
    try:
        data = json.loads(text)
        parameters = tuple(
            LibraryParameter(p["name"], tuple("vocab_size" if n == -1 else n for n in p["shape"]), p["dtype"])
            for p in data["params"]
        )
        metadata = Metadata(
            model_type=data.get("model_type", ""),
            quantization=data.get("quantization", ""),
            context_window_size=data["context_window_size"],
            sliding_window_size=data.get("sliding_window_size", -1),
            attention_sink_size=data.get("attention_sink_size", -1),
            prefill_chunk_size=data["prefill_chunk_size"],
            max_batch_size=data.get("max_batch_size", 1),
            kv_state_kind=data.get("kv_state_kind", "kv_cache"),
            model_task=data.get("model_task", "chat"),
            parameters=parameters,
            embedding=data.get("embedding_metadata"),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise MlcBuildError(f"{path}: `_metadata` cannot be read ({error!r})") from error
    for shards in ("tensor_parallel_shards", "pipeline_parallel_stages"):
        if data.get(shards, 1) > 1:
            raise MlcBuildError(f"{path}: built for {shards} = {data[shards]}, but this runtime runs on one device")
    return metadata


def match(wanted: Sequence[Described], held: Iterable[Described], library: object, weights: object) -> dict[str, int]:
    """What a library's open dimensions are in these weights; {"vocab_size": 4096}.

    Raises MlcBuildError naming the first parameter, in the library's order, that the weights lack or hold in another
    shape or dtype, or else the first tensor that the library does not know: a library of another structure.
    """
    tensors: Mapping[str, Described] = {tensor.name: tensor for tensor in held}
    sizes: dict[str, int] = {}
    for parameter in wanted:
        tensor = tensors.get(parameter.name)
        if tensor is None:
            raise _mismatch(library, weights, f"the library wants {_describe(parameter)}, which the weights lack")
        if not _fits(parameter.shape, tensor.shape, sizes) or parameter.dtype != tensor.dtype:
            raise _mismatch(
                library,
                weights,
                f"the library wants {_describe(parameter, sizes)}, the weights hold {_describe(tensor)}",
            )
    unknown = sorted(tensors.keys() - {parameter.name for parameter in wanted})
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise _mismatch(
            library, weights, f"the library does not know the weights' {_describe(tensors[unknown[0]])}{more}"
        )
    return sizes


def _fits(wanted: Sequence[int | str], held: Sequence[int], sizes: dict[str, int]) -> bool:
    """Whether the shapes agree; a name takes the first size that it meets and must meet it again."""
    if len(wanted) != len(held):
        return False
    return all(
        have == (sizes.setdefault(want, have) if isinstance(want, str) else want)
        for want, have in zip(wanted, held, strict=True)
    )


def _describe(tensor: Described, sizes: Mapping[str, int] | None = None) -> str:
    shape = ", ".join(str((sizes or {}).get(n, n)) for n in tensor.shape)
    return f"{tensor.name} [{shape}] {tensor.dtype}"


def _mismatch(library: object, weights: object, difference: str) -> MlcBuildError:
    return MlcBuildError(
        f"{library} does not fit {weights}: {difference}. Use the library of the same structure and quantization"
    )


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
