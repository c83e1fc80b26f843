"""The files of a model in llama.cpp's format, and what they make together with those of a Hugging Face checkpoint."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlcbuild.errors import CheckpointError
from mlcbuild.gguf import tokenizer
from mlcbuild.gguf.config import config as derived
from mlcbuild.gguf.header import Header, Tensor, read_header

SUFFIX = ".gguf"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def parts(name: str, names: Collection[str], where: str = "") -> list[str]:
    """The files of the model that `name` is one of: itself, or all parts of it. Raises CheckpointError for a lack."""
    found = _PART.fullmatch(name)
    if found is None:
        return [name]
    count = int(found[3])
    if not 1 <= int(found[2]) <= count:
        raise CheckpointError(f"{where}{name}: a part {int(found[2])} of {count}: its name is not what it was")
    wanted = [f"{found[1]}-{number:05}-of-{found[3]}.gguf" for number in range(1, count + 1)]
    missing = [each for each in wanted if each not in names]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}{name}: one of {count} parts, of which {missing[0]}{more} is not there: get it")
    return wanted


def local_parts(path: Path) -> list[Path]:
    """The same of a file that is here; no folder of such a name."""
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder with the name of a GGUF file: rename it")
    names = {each.name for each in path.parent.glob(f"*{SUFFIX}")}
    return [path.parent / name for name in parts(path.name, names, f"{path.parent}/")]


def joined(headers: Sequence[Header]) -> Header:
    """One header of a model's files, in their order: the facts are the first one's."""
    tensors: dict[str, Tensor] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{header.file}: tensor {name} is in {tensors[name].file} too")
            tensors[name] = tensor
    told = headers[0].facts.get("split.tensors.count", len(tensors))
    if told != len(tensors):
        raise CheckpointError(
            f"{headers[0].file}: of its {told} tensors, {len(tensors)} are in the files that are here"
        )
    return Header(headers[0].file, headers[0].facts, tensors)


def read(paths: Mapping[str, Path]) -> Header:
    """The header of files that are here, by their names. Raises CheckpointError where there are none."""
    if not paths:
        raise CheckpointError(
            f"config.json says quant_method gguf, and no file that ends in {SUFFIX} is there: name the file as the "
            "source"
        )
    return joined([read_header(paths[name], name) for name in sorted(paths)])


def config_of(header: Header, paths: Mapping[str, Path]) -> dict[str, Any]:
    """The config.json of files that are here."""
    return derived(header, functools.partial(_bytes, paths))


def small_files(header: Header, paths: Mapping[str, Path], with_tokenizer: bool = True) -> dict[str, Any]:
    """The contents of config.json and of the tokenizer's files, by name."""
    config = {"config.json": config_of(header, paths)}
    return config | tokenizer.files(header) if with_tokenizer else config


def _bytes(paths: Mapping[str, Path], file: str, offset: int, size: int) -> bytes:
    with paths[file].open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)
