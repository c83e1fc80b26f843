"""Weights: mapped where TVM can read them in place, loaded where not, refused where they are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import weights
from tests.runtime import tiny_llama

VALUES = np.linspace(-3, 3, 40, dtype=np.float32).reshape(5, 8)


def record(name: str, dtype: str, nbytes: int, offset: int, encoding: str = "raw") -> dict[str, Any]:
    fields = {"name": name, "shape": [5, 8], "dtype": dtype, "format": encoding}
    return {**fields, "nbytes": nbytes, "byteOffset": offset}


def loaded(folder: Path) -> dict[str, Any]:
    records = weights.read_index(folder)
    return {record.name: tensor for record, tensor in zip(records, weights.load(records), strict=True)}


def is_mapped(address: int, path: Path) -> bool:
    """Whether an address of this process lies in a map of the file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(n, 16) for n in line.split()[0].split("-"))
        if begin <= address < end:
            return line.endswith(str(path))
    return False


def test_aligned_tensors_are_not_copied(tmp_path: Path) -> None:
    tiny_llama.write_weights(tmp_path, {"a": VALUES, "b": 2 * VALUES})
    tensors = loaded(tmp_path)
    for name, factor in (("a", 1), ("b", 2)):
        assert is_mapped(tensors[name].data_ptr(), tmp_path / "params_shard_0.bin")
        assert np.array_equal(np.from_dlpack(tensors[name]), factor * VALUES)


def test_tensors_of_older_folders_are_moved_to_a_boundary(tmp_path: Path) -> None:
    """mlc-ai's shards are packed tightly; a kernel may use aligned loads only."""
    tiny_llama.write_weights(tmp_path, {"a": VALUES[:1], "b": VALUES}, alignment=4)
    tensor = loaded(tmp_path)["b"]
    assert weights.read_index(tmp_path)[1].offset == 32
    assert tensor.data_ptr() % 64 == 0
    assert np.array_equal(np.from_dlpack(tensor), VALUES)


def test_bfloat16_on_disk(tmp_path: Path) -> None:
    """`f32-to-bf16` is a float32 tensor in half the bytes; a bfloat16 tensor stays one."""
    bits = (VALUES.view(np.uint32) >> 16).astype(np.uint16)
    records = [record("wide", "float32", 80, 0, "f32-to-bf16"), record("narrow", "bfloat16", 80, 128)]
    tiny_llama.write_index(tmp_path, bits.tobytes().ljust(128, b"\0") + bits.tobytes(), records)
    tensors = loaded(tmp_path)
    widened = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(np.from_dlpack(tensors["wide"]), widened)
    assert str(tensors["narrow"].dtype) == "bfloat16" and tuple(tensors["narrow"].shape) == (5, 8)
    assert np.abs(widened - VALUES).max() < 2**-7 * 3  # the bits really are VALUES, cut off


def test_the_older_name_of_the_index(tmp_path: Path) -> None:
    tiny_llama.write_weights(tmp_path, {"a": VALUES})
    (tmp_path / "tensor-cache.json").rename(tmp_path / "ndarray-cache.json")
    assert [r.name for r in weights.read_index(tmp_path)] == ["a"]


def damage(folder: Path, change: str) -> None:
    index, shard = folder / "tensor-cache.json", folder / "params_shard_0.bin"
    content = json.loads(index.read_text())
    first = content["records"][0]["records"][0]
    if change == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif change == "missing":
        shard.unlink()
    elif change == "climbs":
        content["records"][0]["dataPath"] = "../params_shard_0.bin"
    elif change == "twice":
        content["records"][0]["records"].append(first)
    elif change == "size":
        first["nbytes"] = 4
    elif change == "behind":
        first["byteOffset"] = 64
    elif change == "format":
        first["format"] = "q4"
    elif change == "no records":
        del content["records"]
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("truncated", r"params_shard_0.bin: 159 bytes, but the index says 160; copy or download it again"),
        ("missing", r"params_shard_0.bin: missing; the folder's index names this shard"),
        ("climbs", r"shard '../params_shard_0.bin' is not a file name of this folder"),
        ("twice", r"tensor a is recorded twice"),
        ("size", r"tensor a has 4 bytes, but \[5, 8\] float32 \(raw\) takes 160"),
        ("behind", r"tensor a ends behind its shard params_shard_0.bin"),
        ("format", r"tensor a has format 'q4'; known are raw and f32-to-bf16"),
        ("no records", r"not a tensor cache index"),
    ],
)
def test_damaged_folders(tmp_path: Path, change: str, message: str) -> None:
    tiny_llama.write_weights(tmp_path, {"a": VALUES})
    damage(tmp_path, change)
    with pytest.raises(MlcBuildError, match=message):
        weights.read_index(tmp_path)
