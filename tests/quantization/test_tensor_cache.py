"""Weights folders: the layout of shards, strict reading, and TVM's own loaders reading the same bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.quantization.tensor_cache import Announced, Writer, read_tensors

RNG = np.random.default_rng(1)
FLOAT32 = RNG.standard_normal((3, 5)).astype(np.float32)
SHORT = (FLOAT32.view(np.uint32) & 0xFFFF0000).view(np.float32)
TENSORS: list[tuple[Announced, npt.NDArray[Any]]] = [
    (Announced("a.q_weight", (4, 9), "uint32"), RNG.integers(0, 1 << 32, (4, 9), dtype=np.uint32)),
    (Announced("a.q_scale", (4, 3), "float16"), RNG.standard_normal((4, 3)).astype(np.float16)),
    (Announced("b.weight", (3, 5), "float32"), FLOAT32),
    (Announced("c.weight", (3, 5), "float32", "f32-to-bf16"), SHORT.view(np.uint16)[:, 1::2].copy()),
    (Announced("d.weight", (7,), "bfloat16"), RNG.integers(0, 1 << 14, 7, dtype=np.uint16)),
]


def write(folder: Path, shard_bytes: int = 320, tensors: list[tuple[Announced, npt.NDArray[Any]]] = TENSORS) -> Any:
    folder.mkdir(exist_ok=True)
    with Writer(folder, shard_bytes) as writer:
        for announced, values in tensors:
            writer.begin(announced)
            for row in values:
                writer.write(np.ascontiguousarray(row))
        writer.finish(original_parameters=100)
    return json.loads((folder / "tensor-cache.json").read_text())


def test_layout(tmp_path: Path) -> None:
    index = write(tmp_path)
    shards = index["records"]
    assert [shard["dataPath"] for shard in shards] == ["params_shard_0.bin", "params_shard_1.bin"]
    assert [[record["name"] for record in shard["records"]] for shard in shards] == [
        ["a.q_weight", "a.q_scale", "b.weight"],  # 144 bytes; 24 from 192; 60 from 256: 316 of at most 320
        ["c.weight", "d.weight"],
    ]
    assert shards[0]["records"][2] == {
        "name": "b.weight",
        "shape": [3, 5],
        "dtype": "float32",
        "format": "raw",
        "nbytes": 60,
        "byteOffset": 256,
    }
    assert shards[1]["records"][0]["format"] == "f32-to-bf16" and shards[1]["records"][0]["nbytes"] == 30
    for shard in shards:
        data = (tmp_path / shard["dataPath"]).read_bytes()
        assert shard["format"] == "raw-shard" and shard["nbytes"] == len(data) <= 320
        assert shard["md5sum"] == hashlib.md5(data).hexdigest()
        assert all(record["byteOffset"] % 64 == 0 for record in shard["records"])
    size = 144 + 24 + 60 + 60 + 14  # as a device holds them: the short form is float32 there
    assert index["metadata"] == {"ParamSize": 5, "ParamBytes": size, "BitsPerParam": size * 8 / 100}


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    index = write(tmp_path, shard_bytes=100)
    assert [[record["name"] for record in shard["records"]] for shard in index["records"]] == [
        ["a.q_weight"],
        ["a.q_scale"],
        ["b.weight", "c.weight"],
        ["d.weight"],
    ]


def test_read_back(tmp_path: Path) -> None:
    write(tmp_path)
    read = dict(read_tensors(tmp_path))
    assert list(read) == [announced.name for announced, _ in TENSORS]
    for announced, values in TENSORS:
        expected = SHORT if announced.name == "c.weight" else values
        assert read[announced.name].dtype == expected.dtype and np.array_equal(read[announced.name], expected)


def test_tvm_reads_the_same_values(tmp_path: Path) -> None:
    tvm = pytest.importorskip("tvm")
    from tvm.contrib import tvmjs

    write(tmp_path)
    loaded, _ = tvmjs.load_tensor_cache(str(tmp_path), tvm.cpu())
    tvm.get_global_func("vm.builtin.tensor_cache.load")(str(tmp_path), tvm.cpu().dlpack_device_type(), 0)
    names = [announced.name for announced, _ in TENSORS]
    cached = tvm.get_global_func("vm.builtin.param_array_from_cache_by_name")(names)
    tvm.get_global_func("vm.builtin.tensor_cache.clear")()
    for position, (name, values) in enumerate(read_tensors(tmp_path)):
        for tensor in (loaded[name], cached[position]):
            assert tuple(tensor.shape) == values.shape
            assert np.asarray(tensor.numpy()).tobytes() == values.tobytes(), name


def test_pieces_must_fill_the_announced_size(tmp_path: Path) -> None:
    with Writer(tmp_path) as writer:
        writer.begin(Announced("a", (4,), "float16"))
        writer.write(np.zeros(3, np.float16))
        with pytest.raises(ValueError, match="a: 2 bytes have not arrived"):
            writer.finish(4)
        with pytest.raises(ValueError, match="a: 4 bytes, 2 were due"):
            writer.write(np.zeros(2, np.float16))
    assert not (tmp_path / "tensor-cache.json").exists()


def test_a_name_is_written_once(tmp_path: Path) -> None:
    with pytest.raises(MlcBuildError, match=r"tensor a\.q_weight is written twice"):
        write(tmp_path, tensors=TENSORS[:1] * 2)


def test_damaged_folders(tmp_path: Path) -> None:
    index = write(tmp_path)
    shard = tmp_path / "params_shard_0.bin"
    good = shard.read_bytes()

    def problem() -> str:
        with pytest.raises(MlcBuildError) as error:
            list(read_tensors(tmp_path))
        return str(error.value).replace(str(tmp_path), "FOLDER")

    shard.write_bytes(good[:-1])
    assert problem() == "FOLDER/params_shard_0.bin: truncated: 315 bytes, tensor-cache.json says 316"
    shard.write_bytes(good + b"x")
    assert problem() == "FOLDER/params_shard_0.bin: too long: 317 bytes, tensor-cache.json says 316"
    shard.write_bytes(b"\xff" + good[1:])
    assert problem().startswith("FOLDER/params_shard_0.bin: damaged: its md5 is ")
    shard.unlink()
    assert problem() == "FOLDER/params_shard_0.bin: missing"
    index["records"][0]["dataPath"] = "../params_shard_0.bin"
    (tmp_path / "tensor-cache.json").write_text(json.dumps(index))
    assert problem() == "FOLDER/tensor-cache.json: shard '../params_shard_0.bin' lies outside the folder"
    (tmp_path / "tensor-cache.json").write_text("{")
    assert problem().startswith("FOLDER/tensor-cache.json: not valid JSON: ")
    (tmp_path / "tensor-cache.json").unlink()
    assert problem() == "FOLDER/tensor-cache.json: missing: FOLDER is no finished weights folder"


def test_a_record_that_does_not_fit_its_shard(tmp_path: Path) -> None:
    index = write(tmp_path)
    index["records"][0]["records"][0]["byteOffset"] = 10_000
    (tmp_path / "tensor-cache.json").write_text(json.dumps(index))
    with pytest.raises(MlcBuildError, match=r"a\.q_weight: 144 bytes at 10000 do not fit its shape \[4, 9\] or the"):
        list(read_tensors(tmp_path))
