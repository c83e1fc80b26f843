"""safetensors files written byte by byte, so that a test can get any part of one wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

NAMES = {"float16": "F16", "uint16": "BF16", "float32": "F32", "float64": "F64", "int64": "I64", "int32": "I32"}


def header(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """The header of a file with these tensors; uint16 arrays are bfloat16 bits."""
    made: dict[str, Any] = {}
    offset = 0
    for name, array in tensors.items():
        made[name] = {
            "dtype": NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    return made


def write(path: Path, tensors: Mapping[str, npt.NDArray[Any]], head: Any = None, tail: bytes = b"") -> Path:
    """Write the file, with `head` (an object, or bytes as they are) in place of its own header."""
    head = header(tensors) if head is None else head
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data + tail)
    return path


def folder(root: Path) -> dict[str, Path]:
    """A folder as the name -> path mapping that readers take."""
    return {path.name: path for path in root.iterdir()}
