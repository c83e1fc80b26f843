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

import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from mlcbuild.checkpoints.header import BITS, TensorRef, first_of, refused_name
from mlcbuild.checkpoints.pickles import Tensor, Unpickler, short
from mlcbuild.errors import POINTER, CheckpointError, pointer

_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before zip
_PROTOCOL = 1001
_LOCAL_HEADER = 30  # bytes of a zip entry's own header, before its name


def read_torch(path: Path, file: str, blob: str = "") -> list[TensorRef]:
    """The tensors of one file, by their names in the pickle; those that are not row-major have `strides`.

    Raises CheckpointError, naming `file`: for a global that is not part of a tensor, for anything but a mapping of
    names to tensors, for a file that is neither of the two formats or is cut short, for a compressed entry, for a
    storage that is missing or has another size, for a view that leaves its storage, for a tensor name that climbs.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
            if start == POINTER[:8]:
                raise CheckpointError(pointer(file))
            if start[:4] == b"PK\x03\x04":
                content, places = _zipped(stream, file)
            else:
                stream.seek(0)
                content, places = _legacy(stream, file)
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(
            f"{file}: truncated or damaged: {str(error) or 'it ends too early'}; get it again"
        ) from None
    except Exception as error:  # whatever a crafted or damaged pickle makes the unpickler raise
        reason = f"{type(error).__name__}: {error}"  # of text only: what is in a pickle is shown by `short`
        raise CheckpointError(f"{file}: not a PyTorch file of weights: {reason:.200}") from None
    refs = []
    problems: list[str] = []
    for name, tensor in _tensors(content, file).items():
        ref = _ref(name, tensor, places, file, blob, path, problems)
        if ref is not None:
            refs.append(ref)
    if problems:
        raise CheckpointError(first_of(problems))
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
    order = archive.open(f"{root}byteorder").read(20) if f"{root}byteorder" in entries else b"little"
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
        return Unpickler(content, file).load(), places


def _legacy(stream: IO[bytes], file: str) -> tuple[Any, dict[str, _Place]]:
    magic = Unpickler(stream, file).load()
    if type(magic) is not int or magic != _MAGIC:
        raise CheckpointError(f"{file}: not a PyTorch file of weights: neither a zip, nor with the older magic number")
    protocol, machine = Unpickler(stream, file).load(), Unpickler(stream, file).load()
    little = machine.get("little_endian", True) if isinstance(machine, dict) else False
    if type(protocol) is not int or protocol != _PROTOCOL or not little:
        found = f"{short(protocol)} of {short(machine)}"
        raise CheckpointError(f"{file}: PyTorch's format {found} is not read; save it as safetensors")
    tensors = Unpickler(stream, file)
    content = tensors.load()
    places = {}
    for key in Unpickler(stream, file).load():
        count = int.from_bytes(stream.read(8), "little")
        storage = tensors.storages[key]
        places[key] = _Place(stream.tell(), count * BITS[storage.dtype] // 8)
        stream.seek(places[key].offset + places[key].nbytes)
    return content, places


def _tensors(content: Any, file: str) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        _not_weights(file, f"it holds a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = "a tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            inner = "; the weights may be inside it: save that part alone" if isinstance(value, dict) else ""
            _not_weights(file, f"{short(name)} is {kind}{inner}")
    return content


def _not_weights(file: str, found: str) -> NoReturn:
    raise CheckpointError(f"{file}: expected a mapping of names to tensors (a state dict), but {found}")


def _ref(
    name: str,
    tensor: Tensor,
    places: Mapping[str, _Place],
    file: str,
    blob: str,
    path: Path,
    problems: list[str],
) -> TensorRef | None:
    where = f"{file}: tensor {name}"
    storage, size = tensor.storage, BITS[tensor.storage.dtype] // 8
    place, key = places.get(storage.key), f"{storage.key!s:.60}"
    if refused := refused_name(name):
        problems.append(f"{file}: {refused}")
    elif place is None:
        problems.append(f"{where}: its storage {key} is not in the file; get it again")
    elif place.nbytes != storage.numel * size:
        problems.append(
            f"{where}: its storage {key} has {place.nbytes} bytes, but {storage.numel} values of "
            f"{storage.dtype} take {storage.numel * size}"
        )
    elif place.offset + place.nbytes > path.stat().st_size:
        problems.append(f"{where}: truncated: the file ends before its storage {key} does; get it again")
    elif prod(tensor.shape) and _last(tensor) >= storage.numel:
        problems.append(f"{where}: {short(list(tensor.shape))} from element {tensor.offset} on leaves its storage")
    else:
        begin = place.offset + tensor.offset * size
        strides = None if _row_major(tensor) else tensor.strides
        return TensorRef(name, file, blob, path, begin, prod(tensor.shape) * size, storage.dtype, tensor.shape, strides)
    return None


def _last(tensor: Tensor) -> int:
    """The storage's element that the view's last one is, for a view that has any."""
    return tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))


def _row_major(tensor: Tensor) -> bool:
    expected = 1
    for size, stride in reversed(list(zip(tensor.shape, tensor.strides, strict=True))):
        if size != 1 and stride != expected:
            return prod(tensor.shape) == 0
        expected *= size
    return True
