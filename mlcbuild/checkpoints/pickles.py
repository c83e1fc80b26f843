"""The pickle in a PyTorch checkpoint file, read without PyTorch by an unpickler that knows tensors and nothing else.

Nothing in it can run, and it is bounded: what it may be long, and how deep in each other its tuples may be.
"""

from __future__ import annotations

import pickle
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any, ClassVar, NamedTuple

from mlcbuild.checkpoints.header import MOST_DIMENSIONS, is_number
from mlcbuild.errors import CheckpointError

# Storage types by name, as safetensors calls their dtype.
_STORAGES = {
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
MAX_PICKLE = 32 << 20  # bytes; a tensor takes about 200
MOST_NESTED = 10_000  # values of a tuple with what is in it: of tuples in tuples, hashes take time without end
_CODE = "a file of weights holds tensors only, and code from a checkpoint is never run; save it as safetensors"

_REFUSED = (
    *(pickle.EMPTY_SET, pickle.FROZENSET, pickle.ADDITEMS, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX),
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)


# Tuples, because a pickle can set the attributes of other objects that it has made.
class Storage(NamedTuple):
    key: str
    dtype: str
    numel: int


class Tensor(NamedTuple):
    """A view of a storage: offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Known(NamedTuple):
    """What a global of the pickle stands for."""

    name: str
    make: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self.make is None:
            raise TypeError(f"{self.name} is not called in a file of weights")
        return self.make(*arguments)


class _Bounded:
    """The beginning of a stream: what a pickle may be long."""

    def __init__(self, stream: IO[bytes], file: str) -> None:
        self.stream, self.file, self.left = stream, file, MAX_PICKLE

    def read(self, count: int) -> bytes:
        return self._counted(self.stream.read(min(count, self.left + 1)))

    def readline(self) -> bytes:
        return self._counted(self.stream.readline(self.left + 1))

    def _counted(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left < 0:
            raise CheckpointError(f"{self.file}: its pickle has more than {MAX_PICKLE:,} bytes; save it as safetensors")
        return data


class Unpickler(pickle._Unpickler):
    """Reads a pickle of tensors. Every global that it names is looked up in one table, and nowhere else.

    It is the one in Python, because that in C can be made to take time and memory without end: tuples in tuples are
    hashed again and again, sets compared, and places to remember things are counted in gigabytes.
    """

    def __init__(self, stream: IO[bytes], file: str) -> None:
        super().__init__(_Bounded(stream, file), encoding="utf-8")
        self.file = file
        self.storages: dict[str, Storage] = {}
        self.sizes: dict[int, tuple[int, tuple[Any, ...]]] = {}  # of tuples, by id; with them, so that ids stay theirs

    def load_tuple(self) -> None:
        super().load_tuple()  # type: ignore[misc]
        self._count()

    def load_tuple1(self) -> None:
        super().load_tuple1()  # type: ignore[misc]
        self._count()

    def load_tuple2(self) -> None:
        super().load_tuple2()  # type: ignore[misc]
        self._count()

    def load_tuple3(self) -> None:
        super().load_tuple3()  # type: ignore[misc]
        self._count()

    def _count(self) -> None:
        made = self.stack[-1]  # type: ignore[attr-defined]
        size = 1 + sum(self.sizes[id(each)][0] if id(each) in self.sizes else 1 for each in made)
        if size > MOST_NESTED:
            raise CheckpointError(
                f"{self.file}: its pickle has tuples of more than {MOST_NESTED:,} values in each other"
            )
        self.sizes[id(made)] = size, made

    def unknown(self) -> None:
        raise pickle.UnpicklingError("it has a code that no pickle has")

    def refused(self) -> None:
        raise CheckpointError(f"{self.file}: its pickle has sets or objects of its own, which is refused: {_CODE}")

    # What torch.save writes is left; neither sets nor other ways to make objects than to call what `find_class` gives.
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **dict.fromkeys(range(256), unknown),
        **pickle._Unpickler.dispatch,
        pickle.TUPLE[0]: load_tuple,
        pickle.TUPLE1[0]: load_tuple1,
        pickle.TUPLE2[0]: load_tuple2,
        pickle.TUPLE3[0]: load_tuple3,
        **dict.fromkeys([code[0] for code in _REFUSED], refused),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Known(name)
        if module == "torch._utils" and name in _CALLS:
            return _Known(name, _CALLS[name])
        if module == "torch" and name == "Size":
            return _Known(name, _size)
        named = f"{module}.{name}"
        raise CheckpointError(f"{self.file}: its pickle names {named:.200}, which is refused: {_CODE}")

    def persistent_load(self, pid: Any) -> Storage:
        kind, known, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(known, _Known) or known.name not in _STORAGES or any(view):
            raise CheckpointError(f"{self.file}: its pickle refers to {short(pid)}, expected a storage of numbers")
        if not is_number(numel) or not isinstance(key, str):
            raise CheckpointError(f"{self.file}: storage {short(key)}: {short(numel)} elements")
        return self.storages.setdefault(key, Storage(key, _STORAGES[known.name], numel))


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not all(map(is_number, numbers)) or len(shape) > MOST_DIMENSIONS:
        raise TypeError("a tensor is (storage, offset, size, stride)")
    if len(shape) != len(strides):
        raise TypeError("a tensor has as many strides as dimensions")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _size(numbers: Any) -> tuple[int, ...]:
    if not all(map(is_number, numbers)):
        raise TypeError("a size is numbers")
    return tuple(numbers)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_CALLS: Mapping[str, Callable[..., Any]] = {
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_parameter": _rebuild_parameter,
}


class _Short(reprlib.Repr):
    repr_OrderedDict = reprlib.Repr.repr_dict


def short(value: Any) -> str:
    """Of a value out of a pickle, which may be endless when it is written out."""
    shown = _Short()
    shown.maxother, shown.maxstring = 40, 60
    try:
        return shown.repr(value)
    except ValueError:  # a number of thousands of digits
        return f"a {type(value).__name__}"
