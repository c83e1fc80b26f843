"""PyTorch checkpoint files (`.bin`, `.pth`) without PyTorch: where each of their tensors lies.

`torch.save` writes a pickle whose tensors are calls of `torch._utils._rebuild_tensor_v2(storage, offset, size, stride,
…)`; a storage is a persistent id `("storage", type, key, device, numel)`. Since PyTorch 1.6 the file is a zip whose
entries are not compressed: `NAME/data.pkl`, and `NAME/data/KEY` for each storage. Before, it was four pickles (a magic
number, the protocol, facts of the machine, the tensors), a pickled list of keys, and for each key the number of
elements (8 bytes) and the elements. (torch/serialization.py: `_save`, `_legacy_save`.)

Either way a tensor's bytes lie in the file as they are, so that they are referred to and never unpacked. The pickle
is read by an unpickler that knows these names and no others: nothing in it can run.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from mlcbuild.checkpoints.header import BITS, TensorRef, climbs, pointer
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
_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before zip
_PROTOCOL = 1001
_LOCAL_HEADER = 30  # bytes of a zip entry's own header, before its name
_CODE = "a file of weights holds tensors only, and code from a checkpoint is never run; save it as safetensors"


# Tuples, because a pickle can set the attributes of other objects that it has made.
class _Storage(NamedTuple):
    key: str
    dtype: str
    numel: int


class _Tensor(NamedTuple):
    """A view of a storage: offset and strides in elements."""

    storage: _Storage
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


def read_torch(path: Path, file: str, blob: str = "") -> list[TensorRef]:
    """The tensors of one file, by their names in the pickle; those that are not row-major have `strides`.

    Raises CheckpointError, naming `file`: for a global that is not part of a tensor, for anything but a mapping of
    names to tensors, for a file that is neither of the two formats or is cut short, for a compressed entry, for a
    storage that is missing or has another size, for a view that leaves its storage, for a tensor name that climbs.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
            if start == b"version ":
                raise CheckpointError(pointer(file))
            if start[:4] == b"PK\x03\x04":
                content, places = _zipped(stream, file)
            else:
                stream.seek(0)
                content, places = _legacy(stream, file)
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{file}: truncated or damaged: {error or 'it ends too early'}; get it again") from None
    except Exception as error:  # whatever a crafted or damaged pickle makes the unpickler raise
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{file}: not a PyTorch file of weights: {reason:.200}") from None
    refs = []
    problems: list[str] = []
    for name, tensor in _tensors(content, file).items():
        ref = _ref(name, tensor, places, file, blob, path, problems)
        if ref is not None:
            refs.append(ref)
    if problems:
        raise CheckpointError("\n".join(problems))
    return refs


class _Place(NamedTuple):
    offset: int
    nbytes: int


def _zipped(stream: IO[bytes], file: str) -> tuple[Any, dict[str, _Place]]:
    archive = zipfile.ZipFile(stream)
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{file}: a zip without data.pkl, so not a PyTorch file of weights: {', '.join(entries):.100}"
        )
    root = pickles[0].removesuffix("data.pkl")
    packed = [name for name, entry in entries.items() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(f"{file}: {packed[0]} is compressed, which torch.save never does; save it again")
    order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
    if order != b"little":
        raise CheckpointError(f"{file}: its numbers are {order!r:.20}-endian; save it on a little-endian machine")
    prefix = f"{root}data/"
    places = {}
    for name, entry in entries.items():
        if name.startswith(prefix):
            stream.seek(entry.header_offset)
            header = stream.read(_LOCAL_HEADER)
            if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
                raise CheckpointError(f"{file}: truncated or damaged: {name} is not where the zip's index says")
            # The entry's own header repeats its name, and has another extra field than the index: padding.
            before = _LOCAL_HEADER + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
            places[name.removeprefix(prefix)] = _Place(entry.header_offset + before, entry.file_size)
    with archive.open(pickles[0]) as content:
        return _Unpickler(content, file).load(), places


def _legacy(stream: IO[bytes], file: str) -> tuple[Any, dict[str, _Place]]:
    magic = _Unpickler(stream, file).load()
    if magic != _MAGIC:
        raise CheckpointError(f"{file}: not a PyTorch file of weights: neither a zip, nor with the older magic number")
    protocol, machine = _Unpickler(stream, file).load(), _Unpickler(stream, file).load()
    if protocol != _PROTOCOL or not machine.get("little_endian", True):
        raise CheckpointError(f"{file}: PyTorch's format {protocol} of {machine} is not read; save it as safetensors")
    tensors = _Unpickler(stream, file)
    content = tensors.load()
    places = {}
    for key in _Unpickler(stream, file).load():
        count = int.from_bytes(stream.read(8), "little")
        storage = tensors.storages[key]
        places[key] = _Place(stream.tell(), count * BITS[storage.dtype] // 8)
        stream.seek(places[key].offset + places[key].nbytes)
    return content, places


class _Unpickler(pickle.Unpickler):
    """Reads a pickle of tensors. Every global that it names is looked up in one table, and nowhere else."""

    def __init__(self, stream: IO[bytes], file: str) -> None:
        super().__init__(stream, encoding="utf-8")
        self.file = file
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Known(name)
        if module == "torch._utils" and name in _CALLS:
            return _Known(name, _CALLS[name])
        if module == "torch" and name == "Size":
            return _Known(name, tuple)
        raise CheckpointError(f"{self.file}: its pickle names {module}.{name}, which is refused: {_CODE}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, known, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(known, _Known) or known.name not in _STORAGES or any(view):
            raise CheckpointError(f"{self.file}: its pickle refers to {pid!r:.100}, expected a storage of numbers")
        if type(numel) is not int or numel < 0 or not isinstance(key, str):
            raise CheckpointError(f"{self.file}: storage {key!r:.40}: {numel!r:.40} elements")
        return self.storages.setdefault(key, _Storage(key, _STORAGES[known.name], numel))


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(number) is int and number >= 0 for number in numbers):
        raise TypeError("a tensor is (storage, offset, size, stride)")
    if len(shape) != len(strides):
        raise TypeError("a tensor has as many strides as dimensions")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_CALLS: Mapping[str, Callable[..., Any]] = {
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_parameter": _rebuild_parameter,
}


def _tensors(content: Any, file: str) -> dict[str, _Tensor]:
    if not isinstance(content, dict):
        _not_weights(file, f"it holds a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            kind = "a tensor" if isinstance(value, _Tensor) else f"a {type(value).__name__}"
            inner = "; the weights may be inside it: save that part alone" if isinstance(value, dict) else ""
            _not_weights(file, f"{name!r:.60} is {kind}{inner}")
    return content


def _not_weights(file: str, found: str) -> NoReturn:
    raise CheckpointError(f"{file}: expected a mapping of names to tensors (a state dict), but {found}")


def _ref(
    name: str,
    tensor: _Tensor,
    places: Mapping[str, _Place],
    file: str,
    blob: str,
    path: Path,
    problems: list[str],
) -> TensorRef | None:
    where = f"{file}: tensor {name}"
    storage, size = tensor.storage, BITS[tensor.storage.dtype] // 8
    place = places.get(storage.key)
    if climbs(name):
        problems.append(f"{file}: tensor name {name!r} is refused: as a path it would climb out of its folder")
    elif place is None:
        problems.append(f"{where}: its storage {storage.key} is not in the file; get it again")
    elif place.nbytes != storage.numel * size:
        problems.append(
            f"{where}: its storage {storage.key} has {place.nbytes} bytes, but {storage.numel} values of "
            f"{storage.dtype} take {storage.numel * size}"
        )
    elif place.offset + place.nbytes > path.stat().st_size:
        problems.append(f"{where}: truncated: the file ends before its storage {storage.key} does; get it again")
    elif prod(tensor.shape) and _last(tensor) >= storage.numel:
        problems.append(f"{where}: {list(tensor.shape)} from element {tensor.offset} on leaves its storage")
    else:
        begin = place.offset + tensor.offset * size
        strides = None if _row_major(tensor) else tensor.strides
        return TensorRef(name, file, blob, path, begin, prod(tensor.shape) * size, storage.dtype, tensor.shape, strides)
    return None


def _last(tensor: _Tensor) -> int:
    """The storage's element that the view's last one is, for a view that has any."""
    return tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))


def _row_major(tensor: _Tensor) -> bool:
    expected = 1
    for size, stride in reversed(list(zip(tensor.shape, tensor.strides, strict=True))):
        if size != 1 and stride != expected:
            return prod(tensor.shape) == 0
        expected *= size
    return True
