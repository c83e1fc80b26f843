"""convert with a base or an adapter beside the checkpoint: what it refuses, and what it still refers to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.mapped import read
from mlcbuild.engine.job import Job, local_job
from mlcbuild.errors import CheckpointError
from mlcbuild.steps import convert, download
from tests.checkpoints.files import write
from tests.checkpoints.test_convert_and_quantize import save, structure

AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}}


def job(folder: Path, **others: Path) -> Job:
    fields = {"structure": structure(folder / "model").to_json()}
    return local_job({"checkpoint": folder / "model", **others}, fields, folder / "job")


def problem(folder: Path, **others: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        convert.run(job(folder, **others))
    return str(error.value)


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def adapter(folder: Path, **tensors: Any) -> Path:
    write(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    return folder


def test_what_an_adapter_leaves_alone_is_referred_to(tmp_path: Path) -> None:
    state = save(tmp_path / "model", dtype="float32")
    name = "model.layers.0.self_attn.k_proj"
    factors = {
        f"base_model.model.{name}.lora_{side}.weight": np.ones(shape, np.float32)
        for side, shape in (("A", (1, 48)), ("B", (24, 1)))
    }
    made = job(tmp_path, lora=adapter(tmp_path / "adapter", **factors))
    convert.run(made)
    document = json.loads((made.output / "parameters.json").read_text())
    parts = {part["tensor"]: part for entry in document["parameters"] for part in entry["parts"]}
    merged = [name for name, part in parts.items() if part["file"] == "tensors-0.bin"]
    assert merged == [f"{name}.weight"] and {path.name for path in made.output.iterdir()} == {
        "parameters.json",
        "tensors-0.bin",
    }
    part = parts[merged[0]]
    ref = TensorRef(merged[0], "", "", made.output / "tensors-0.bin", part["offset"], part["nbytes"], "F32", (24, 48))
    np.testing.assert_array_equal(read(ref), state[merged[0]] + 1)


def test_quantized_checkpoints_are_not_merged(tmp_path: Path) -> None:
    save(tmp_path / "model")
    save(tmp_path / "base")
    change(tmp_path / "base" / "config.json", **AWQ)
    assert problem(tmp_path, base=tmp_path / "base") == (
        "delta_of: the base is quantized by awq: name the unquantized one"
    )


@pytest.mark.parametrize(("name", "key"), [("base", "delta_of"), ("lora", "lora")])
def test_nothing_is_merged_into_a_quantized_checkpoint(tmp_path: Path, name: str, key: str) -> None:
    save(tmp_path / "model")
    change(tmp_path / "model" / "config.json", **AWQ)
    (tmp_path / "other").mkdir()
    assert problem(tmp_path, **{name: tmp_path / "other"}) == (
        f"{key}: the checkpoint is quantized already: name the unquantized one as its source"
    )


def test_a_base_without_weights(tmp_path: Path) -> None:
    save(tmp_path / "model")
    (tmp_path / "base").mkdir()
    assert problem(tmp_path, base=tmp_path / "base").startswith("delta_of: no weights: expected model.safetensors")


def test_pickles_that_are_not_row_major_in_a_quantized_checkpoint(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save(tmp_path / "model")
    change(tmp_path / "model" / "config.json", **AWQ)
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"a.qweight": torch.ones(4, 8).T}, tmp_path / "model" / "pytorch_model.bin")
    assert problem(tmp_path) == (
        "pytorch_model.bin: tensor a.qweight: not row-major, in a checkpoint that is quantized already; "
        "save it as safetensors"
    )


def test_a_folder_without_files(tmp_path: Path) -> None:
    """FAULTS C: `the step ended well but made nothing`."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="the folder has nothing that is read of a checkpoint: "):
        download.run(local_job({"files": tmp_path / "empty"}, {}, tmp_path / "job"))


def test_unfinished_downloads_are_given_up_after_a_month(tmp_path: Path) -> None:
    import os
    import time

    for name, days in (("old", 31), ("new", 29)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "part"
        file.write_bytes(b"")
        for path in (file, tmp_path / name):
            os.utime(path, (time.time() - days * 86400,) * 2)
    download._sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
