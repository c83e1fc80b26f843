"""What can be said of a library without running it: its file format, its metadata, the names of its functions.

For targets whose code this machine cannot execute. The bytes of `_metadata` and of function names lie unpacked in
every kind of library that TVM writes (ELF, Mach-O, PE, WebAssembly, tar of objects).
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Sequence
from pathlib import Path

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.library import CREATE, Described, Metadata, match, parse_metadata

_ELF_MACHINES = {3: "x86", 62: "x86-64", 40: "arm", 183: "aarch64", 243: "riscv"}
_MACH_CPUS = {0x01000007: "x86-64", 0x0100000C: "arm64"}
_PE_MACHINES = {0x8664: "x86-64", 0xAA64: "aarch64"}
_FORMATS = {".so": "ELF", ".dylib": "Mach-O", ".dll": "PE", ".wasm": "WebAssembly", ".tar": "tar"}
_FORWARD = ("embed", "prefill", "decode", "batch_prefill", "batch_decode")
_METADATA_START = b'{"model_type"'


def check(path: Path, tensors: Sequence[Described], name: str) -> list[str]:
    """What was checked of library `name` at `path`, as sentences.

    Raises MlcBuildError where the file is not of its suffix's format, lacks a function of the contract, or was
    compiled for other parameters than `tensors`.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        format_name = file_format(data[:4096])
        expected = _FORMATS.get(Path(name).suffix, "")
        if not format_name.startswith(expected):
            raise MlcBuildError(
                f"{name}: expected a {expected} file, but its first bytes say {format_name or 'nothing known'}"
            )
        metadata = find_metadata(data, path, name)
        functions = _functions(metadata, name)
        missing = [function for function in functions if data.find(function.encode()) < 0]
        if missing:
            raise MlcBuildError(f"{name}: no function named {', '.join(missing)} in it")
    match(metadata.parameters, tensors, name, "these weights")
    return [
        f"file format: {format_name}",
        f"functions named: {', '.join(functions)}",
        f"metadata: {len(metadata.parameters)} parameters with the names, shapes and dtypes of the weights",
    ]


def _functions(metadata: Metadata, name: str) -> tuple[str, ...]:
    """The names of the functions that a runtime calls. An encoder has one and no state."""
    if metadata.kv_state_kind == "none":
        return ("prefill",)
    if metadata.kv_state_kind not in CREATE:
        raise MlcBuildError(
            f"{name}: its state is `{metadata.kv_state_kind}`; "
            f"known are {', '.join(f'`{each}`' for each in CREATE)} and `none`"
        )
    ending = "_to_last_hidden_states" if metadata.model_task == "embedding" else ""
    forward = (each if each == "embed" else f"{each}{ending}" for each in _FORWARD)
    return (*forward, *CREATE[metadata.kv_state_kind])


def file_format(head: bytes) -> str:
    """The format and machine that a file's first bytes tell, such as `ELF x86-64`; empty where they tell nothing."""
    if head[:4] == b"\x7fELF":
        machine = struct.unpack_from("<H" if head[5] == 1 else ">H", head, 18)[0]
        return f"ELF {_ELF_MACHINES.get(machine, f'machine {machine}')}"
    if head[:4] == b"\xcf\xfa\xed\xfe":
        cpu = struct.unpack_from("<I", head, 4)[0]
        return f"Mach-O {_MACH_CPUS.get(cpu, f'cpu {cpu}')}"
    if head[:2] == b"MZ":
        at = struct.unpack_from("<I", head, 60)[0]
        if head[at : at + 4] == b"PE\0\0":
            machine = struct.unpack_from("<H", head, at + 4)[0]
            return f"PE {_PE_MACHINES.get(machine, f'machine {machine}')}"
    if head[:8] == b"\0asm\1\0\0\0":
        return "WebAssembly"
    return "tar" if head[257:262] == b"ustar" else ""


def find_metadata(data: bytes | mmap.mmap, path: Path, name: str) -> Metadata:
    """`_metadata` as it lies in the file. Raises MlcBuildError where there is none."""
    start = data.find(_METADATA_START)
    if start < 0:
        raise MlcBuildError(f"{name}: no `_metadata` in it, so this is not a library of a language model")
    depth = 0
    for end in range(start, len(data)):
        depth += {0x7B: 1, 0x7D: -1}.get(data[end], 0)  # braces; no name in metadata contains one
        if depth == 0:
            return parse_metadata(json.dumps(json.loads(data[start : end + 1])), path)
    raise MlcBuildError(f"{name}: its `_metadata` is cut off")
