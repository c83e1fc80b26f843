"""Bad checkpoints and full disks: a clear error that names the file or tensor, and nothing left that looks finished."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.end_to_end.workspace import Workspace, edit_json, make_workspace, write_checkpoint
from tests.support.tools import missing

pytestmark = pytest.mark.slow

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint, which NumPy can edit."""
    folder = tmp_path_factory.mktemp("plain") / "checkpoint"
    write_checkpoint(folder, "float32")
    return folder


def tensors(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "model.safetensors"
    return path, load_file(path)


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path, held = tensors(folder)
        change(held)
        save_file(held, path)

    return apply


def shard(folder: Path) -> None:
    """Two shards and their index, as large checkpoints have."""
    path, held = tensors(folder)
    names = sorted(held)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    weight_map: dict[str, str] = {}
    for file, members in parts.items():
        save_file({name: held[name] for name in members}, folder / file)
        weight_map |= dict.fromkeys(members, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    path.unlink()


def truncated(folder: Path) -> None:
    path, _ = tensors(folder)
    os.truncate(path, path.stat().st_size - 100)


def missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def duplicated_shard(folder: Path) -> None:
    """The second shard holds what the first one holds."""
    shard(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")


def climbing_file(folder: Path) -> None:
    shard(folder)
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"][Q_PROJ] = "../../secret.safetensors"
    index.write_text(json.dumps(data))


def set_value(value: float) -> Callable[[dict[str, Any]], None]:
    def change(held: dict[str, Any]) -> None:
        held[Q_PROJ][3, 5] = value

    return change


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", changes)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def add(name: str) -> Callable[[Path], None]:
    return edit(lambda held: held.update({name: np.ones(3, np.float32)}))


def replace(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return edit(lambda held: held.update({Q_PROJ: change(held[Q_PROJ])}))


# What is done to the checkpoint, and the words that the error must have.
CASES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "truncated": (truncated, ["model.safetensors", "truncated"]),
    "missing_shard": (missing_shard, ["model-00002-of-00002.safetensors"]),
    "duplicated_shard": (duplicated_shard, ["model-00002-of-00002.safetensors"]),
    "wrong_shape": (replace(lambda w: w[:-1]), [Q_PROJ, "63"]),
    "wrong_dtype": (replace(lambda w: w.astype(np.int32)), [Q_PROJ, "dtype I32"]),
    "missing_tensor": (edit(lambda held: held.pop(Q_PROJ)), [Q_PROJ]),
    "extra_tensor": (add("model.layers.0.extra"), ["model.layers.0.extra"]),
    "nan": (edit(set_value(np.nan)), [Q_PROJ, "NaN", "[3, 5]"]),
    "infinity": (edit(set_value(-np.inf)), [Q_PROJ, "-Inf", "[3, 5]"]),
    "too_large_for_float16": (edit(set_value(1e6)), [Q_PROJ, "float16"]),
    "fewer_layers": (config(num_hidden_layers=1), ["num_hidden_layers", "layer 1"]),
    "more_layers": (config(num_hidden_layers=3), ["model.layers.2."]),
    "unknown_architecture": (config(model_type="lama"), ["`lama`", "did you mean `llama`?"]),
    "not_computed": (config(hidden_act="tanh"), ["hidden_act", "'silu'"]),
    "no_config": (remove("config.json"), ["config.json", "no such file"]),
    "tensor_name_that_climbs": (add("../../x"), ["../../x"]),
    "file_name_that_climbs": (climbing_file, ["../../secret.safetensors"]),
    "no_tokenizer": (remove("tokenizer.json"), ["tokenizer.json"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_checkpoint(case: str, tmp_path: Path, shared_cache: Path, plain: Path) -> None:
    damage, words = CASES[case]
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(plain, checkpoint)
    damage(checkpoint)
    workspace = make_workspace(tmp_path / "workspace", shared_cache, checkpoint)
    for _ in range(2):  # a second try meets the same problem: nothing of the first was taken for finished
        done = workspace.doit("build", check=False)
        text = done.stdout + done.stderr
        assert done.returncode in (1, 3), text
        for word in words:
            assert word in text, text
        assert "Traceback" not in text
        assert not (workspace.root / "dist" / "tiny-cpu").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, check=False)
    if done.returncode:
        missing("the right to mount a small file system (root)")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_says_so_and_leaves_the_cache_usable(tmp_path: Path, small_disk: Path, plain: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace", small_disk / "cache", plain)
    done = workspace.doit("build", check=False)
    text = done.stdout + done.stderr
    assert done.returncode == 1 and "disk" in text and "full" in text, text
    assert "Traceback" not in text
    assert not (workspace.root / "dist" / "tiny-cpu").exists()
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    workspace.doit("build")
    assert (workspace.root / "dist" / "tiny-cpu" / "manifest.json").exists()


def test_a_checkpoint_that_changes_is_built_anew(workspace: Workspace, tmp_path: Path, plain: Path) -> None:
    checkpoint = tmp_path / "mine"
    shutil.copytree(plain, checkpoint)
    workspace.model("tiny", checkpoint)
    workspace.doit("build")
    before = workspace.digests("tiny-cpu")
    edit(set_value(0.25))(checkpoint)
    workspace.doit("build")
    after = workspace.digests("tiny-cpu")
    changed = {name for name in before if before[name] != after[name]}
    assert "tiny-q4f16_1-MLC/params_shard_0.bin" in changed and "tiny-q4f16_1-cpu.so" not in changed
