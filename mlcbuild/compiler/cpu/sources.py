"""Which C sources a lowered module calls: an attribute of it, so that a library holds the kernels that it needs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from tvm import IRModule

_ATTRIBUTE = "mlcbuild.kernels"


@dataclass(frozen=True)
class Source:
    """A file of kernels/, compiled with `defines` as `name`.o."""

    name: str
    file: str
    defines: tuple[tuple[str, str | int], ...]


def attach(module: IRModule, needed: Iterable[Source]) -> IRModule:
    text = json.dumps([[s.name, s.file, [list(pair) for pair in s.defines]] for s in needed])
    return module.with_attr(_ATTRIBUTE, text)


def attached(module: IRModule) -> tuple[Source, ...]:
    """The sources that `attach` was given, also after the module was saved and loaded."""
    listed = json.loads(str(module.attrs[_ATTRIBUTE]))
    return tuple(Source(name, file, tuple((key, value) for key, value in pairs)) for name, file, pairs in listed)
