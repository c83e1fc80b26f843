"""What is said of a library that this machine cannot run."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import library_file, weights


def test_a_library_and_its_weights(tiny_library: Path, tiny_package: Path) -> None:
    tensors = weights.read_index(tiny_package / "tiny-q0f32-MLC")
    assert library_file.check(tiny_library, tensors, "tiny.so") == [
        "file format: ELF x86-64",
        "functions named: embed, prefill, decode, batch_prefill, batch_decode, create_tir_paged_kv_cache",
        "metadata: 15 parameters with the names, shapes and dtypes of the weights",
    ]
    with pytest.raises(MlcBuildError, match=r"tiny.so does not fit these weights: .* model.norm.weight"):
        library_file.check(tiny_library, [t for t in tensors if t.name != "model.norm.weight"], "tiny.so")
    with pytest.raises(MlcBuildError, match=r"tiny.dylib: expected a Mach-O file, but its first bytes say ELF x86-64"):
        library_file.check(tiny_library, tensors, "tiny.dylib")


@pytest.mark.parametrize(
    ("state", "task", "missing"),
    [
        ("kv_cache", "chat", "batch_prefill, batch_decode, create_tir_paged_kv_cache"),
        ("rnn_state", "chat", "batch_prefill, batch_decode, create_rnn_state"),
        ("hybrid", "chat", "batch_prefill, batch_decode, create_tir_paged_kv_cache, create_rnn_state"),
        ("kv_cache", "embedding", "prefill_to_last_hidden_states, decode_to_last_hidden_states, .*create_tir_paged"),
    ],
)
def test_a_library_has_the_functions_of_its_kind(tmp_path: Path, state: str, task: str, missing: str) -> None:
    path = tmp_path / "x.wasm"
    metadata: dict[str, Any] = {"model_type": "m", "quantization": "q", "params": []}
    metadata |= {"kv_state_kind": state, "model_task": task, "context_window_size": 8, "prefill_chunk_size": 8}
    path.write_bytes(b"\0asm\1\0\0\0 embed prefill decode " + json.dumps(metadata).encode())
    with pytest.raises(MlcBuildError, match=f"no function named {missing}"):
        library_file.check(path, [], path.name)
    path.write_bytes(b"\0asm\1\0\0\0 prefill " + json.dumps({**metadata, "kv_state_kind": "none"}).encode())
    assert "functions named: prefill" in library_file.check(path, [], path.name)  # an encoder's
    path.write_bytes(b"\0asm\1\0\0\0 prefill " + json.dumps({**metadata, "kv_state_kind": "tape"}).encode())
    with pytest.raises(
        MlcBuildError, match="its state is `tape`; known are `kv_cache`, `rnn_state`, `hybrid` and `none`"
    ):
        library_file.check(path, [], path.name)


def test_files_without_a_model(tmp_path: Path) -> None:
    path = tmp_path / "x.wasm"
    path.write_bytes(b"\0asm\1\0\0\0 embed prefill decode")
    with pytest.raises(MlcBuildError, match="no `_metadata` in it, so this is not a library of a language model"):
        library_file.check(path, [], path.name)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\x7fELF\2\1" + bytes(12) + struct.pack("<H", 183), "ELF aarch64"),
        (b"\xcf\xfa\xed\xfe" + struct.pack("<I", 0x0100000C), "Mach-O arm64"),
        (b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0" + struct.pack("<H", 0x8664), "PE x86-64"),
        (b"\0asm\1\0\0\0", "WebAssembly"),
        (bytes(257) + b"ustar", "tar"),
        (b"#!/bin/sh", ""),
    ],
)
def test_formats(head: bytes, name: str) -> None:
    assert library_file.file_format(head.ljust(512, b"\0")) == name
