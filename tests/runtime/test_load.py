"""load(): which files make a package, and weights with a library of another structure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import load, weights
from tests.runtime import tiny_llama


def test_a_package_and_a_weights_folder_with_a_library(tiny_package: Path, tiny_library: Path) -> None:
    ids = [5, 6, 7]
    whole = load(tiny_package).logits(ids)
    for other in (
        load(tiny_package / "tiny-q0f32-MLC"),  # the library beside it
        load(tiny_package / "tiny-q0f32-MLC", library=tiny_library),
        load(str(tiny_package), library=str(tiny_library)),
    ):
        assert np.array_equal(other.logits(ids), whole)


def test_only_the_runtime_is_loaded(tiny_package: Path) -> None:
    """No `import tvm` (a second), no compiler library (100 MB), and torch's own copy of nothing."""
    code = f"""
import sys
from mlcbuild.runtime import load
load({str(tiny_package)!r}).logits([1, 2, 3])
maps = open("/proc/self/maps").read()
print("tvm" in sys.modules, "libtvm_compiler" in maps, "libtvm_runtime" in maps)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "False False True\n"


@pytest.mark.slow
def test_beside_an_imported_tvm(tiny_package: Path) -> None:
    code = f"""
import tvm
from mlcbuild.runtime import load
print(load({str(tiny_package)!r}).logits([1, 2, 3]).shape)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "(3, 300)\n"


def test_a_library_runs_on_the_device_that_it_was_built_for(tiny_package: Path) -> None:
    assert load(tiny_package, device="cpu").network.library.device.kind == "cpu"
    with pytest.raises(MlcBuildError, match="a library for `cpu` cannot run on the device `cuda`"):
        load(tiny_package, device="cuda")
    with pytest.raises(MlcBuildError, match="device `tpu`: this runtime runs libraries on cpu and cuda"):
        load(tiny_package, device="tpu")


def test_folders_that_are_no_package(tmp_path: Path, tiny_package: Path, tiny_library: Path) -> None:
    with pytest.raises(MlcBuildError, match="nowhere: no such folder; build the recipe first"):
        load(tmp_path / "nowhere")
    with pytest.raises(MlcBuildError, match="no weights here: expected a folder <model>-<quantization>-MLC"):
        load(tmp_path)
    shutil.copytree(tiny_package / "tiny-q0f32-MLC", tmp_path / "a-MLC")
    with pytest.raises(MlcBuildError, match=r"no library here \(.so, .dylib, .dll\); name one with library=PATH"):
        load(tmp_path)
    (tmp_path / "a-webgpu.wasm").write_bytes(b"\0asm\1\0\0\0")
    with pytest.raises(MlcBuildError, match=r"a-webgpu.wasm cannot be loaded here: it is for another kind of runtime"):
        load(tmp_path)
    for name in ("x.so", "y.so"):
        shutil.copy(tiny_library, tmp_path / name)
    with pytest.raises(MlcBuildError, match=r"several libraries \(x.so, y.so\); choose one with library=PATH"):
        load(tmp_path)
    shutil.copytree(tmp_path / "a-MLC", tmp_path / "b-MLC")
    with pytest.raises(MlcBuildError, match=r"several weights folders \(a-MLC, b-MLC\); name one, and its library"):
        load(tmp_path)


def test_files_that_are_no_library(tmp_path: Path, tiny_package: Path) -> None:
    with pytest.raises(MlcBuildError, match=r"missing.so: no such library"):
        load(tiny_package, library=tmp_path / "missing.so")
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(MlcBuildError, match=r"cannot load it as a model library .*; was it built for another target?"):
        load(tiny_package, library=tmp_path / "text.so")
    with pytest.raises(MlcBuildError, match="not a library that can be loaded here"):
        load(tiny_package, library=Path(__file__))


def without(parameters: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key != name}


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            lambda p: without(p, "model.layers.1.mlp.down_proj.weight"),
            r"the library wants model.layers.1.mlp.down_proj.weight \[64, 96\] float32, which the weights lack",
        ),
        (
            lambda p: {**p, "model.layers.0.self_attn.o_proj.weight": np.zeros((64, 32), np.float32)},
            r"wants model.layers.0.self_attn.o_proj.weight \[64, 64\] float32, the weights hold .* \[64, 32\] float32",
        ),
        (
            lambda p: {**p, "model.layers.2.mlp.down_proj.weight": np.zeros((64, 96), np.float32)},
            r"the library does not know the weights' model.layers.2.mlp.down_proj.weight \[64, 96\] float32",
        ),
        (
            lambda p: {**p, "lm_head.weight": p["lm_head.weight"][:-1]},
            r"the library wants lm_head.weight \[300, 64\] float32, the weights hold lm_head.weight \[299, 64\]",
        ),
    ],
)
def test_a_library_of_another_structure(
    tmp_path: Path, tiny_library: Path, reference: Any, change: Any, difference: str
) -> None:
    """Nothing runs before the first difference is named: a wrong shape would read behind a tensor's end."""
    tiny_llama.write_weights(tmp_path, change(tiny_llama.mlc_parameters(reference)))
    with pytest.raises(MlcBuildError, match=f"tiny-q0f32-cpu.so does not fit .*: .*{difference}"):
        load(tmp_path, library=tiny_library)


def test_a_library_of_another_precision(tmp_path: Path, tiny_library: Path, tiny_package: Path) -> None:
    folder = tmp_path / "half-MLC"
    shutil.copytree(tiny_package / "tiny-q0f32-MLC", folder)
    index = json.loads((folder / "tensor-cache.json").read_text())
    record = index["records"][0]["records"][0]
    record |= {"dtype": "float16", "nbytes": record["nbytes"] // 2}
    (folder / "tensor-cache.json").write_text(json.dumps(index))
    with pytest.raises(MlcBuildError, match=r"embed_tokens.weight \[300, 64\] float32, the weights hold .* float16"):
        load(folder, library=tiny_library)


def test_another_vocabulary_shares_the_library(tmp_path: Path, tiny_library: Path, reference: Any) -> None:
    """`vocab_size` is open in the library: the weights say it."""
    parameters = tiny_llama.mlc_parameters(reference)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        parameters[name] = parameters[name][:200]
    tiny_llama.write_weights(tmp_path, parameters)
    model = load(tmp_path, library=tiny_library)
    assert model.vocab_size == 200 and model.logits([1, 2]).shape == (2, 200)
    assert weights.read_index(tmp_path)[0].shape == (200, 64)
