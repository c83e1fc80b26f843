"""New weights with a library that is there, as in MLC's tutorials: weights only, libraries only, and the two loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import load
from tests.end_to_end.workspace import Workspace, edit_json, make_workspace, write_checkpoint

pytestmark = pytest.mark.slow


def artifact(workspace: Workspace, kind: str, name: str) -> Path:
    """The files of a step's latest action, as a folder."""
    folder = workspace.root / "artifacts" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    records = [json.loads(path.read_text()) for path in (workspace.cache / "ac").rglob("*.json")]
    (record,) = (record for record in records if record["step"] == kind and record["name"] == f"{kind}:{name}")
    for file, (digest, _, _) in record["files"].items():
        shutil.copy(workspace.cache / "cas" / digest[:2] / digest, folder / file)
    return folder


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not the one that all end-to-end tests share: these tests say what is built, whatever ran before them."""
    return tmp_path_factory.mktemp("reuse")


@pytest.fixture
def variant(tmp_path: Path, own_cache: Path, tiny_checkpoint: Path) -> Workspace:
    """Beside `tiny`, the model `tuned`: other weights and other words, the same structure."""
    workspace = make_workspace(tmp_path / "workspace", own_cache, tiny_checkpoint)
    write_checkpoint(tmp_path / "tuned", vocab_size=320)
    workspace.model("tuned", tmp_path / "tuned")
    workspace.recipe("tuned-cpu", model="tuned")
    return workspace


def test_new_weights_run_in_the_library_of_another_model(variant: Workspace) -> None:
    variant.doit("build", "recipe=tiny-cpu")
    built = variant.built("quantize", "recipe=tuned-cpu")
    assert [step.partition(":")[0] for step in built] == ["download", "convert", "quantize"]
    weights = artifact(variant, "quantize", "tuned-q4f16_1")
    library = variant.root / "dist/tiny-cpu/tiny-q4f16_1-cpu.so"
    found = load(weights, library=library).logits([5, 6, 7])
    assert found.shape == (3, 320)
    # The package has the same numbers, in the same library: nothing is compiled for it.
    built = variant.built("build", "recipe=tuned-cpu")
    assert {step.partition(":")[0] for step in built} == {"measure", "package", "verify"}
    assert np.array_equal(load(variant.root / "dist/tuned-cpu").logits([5, 6, 7]), found)
    answer = variant.run("mlcbuild", "inspect", str(library), "--json").stdout
    takes = json.loads(answer)["takes"]
    assert takes == {"quantize:tiny-q4f16_1": ["tiny-cpu"], "quantize:tuned-q4f16_1": ["tuned-cpu"]}


def test_a_library_alone_needs_no_weights(variant: Workspace, tmp_path: Path) -> None:
    """`doit library` reads config.json and nothing else: there may be no weights yet."""
    shutil.copytree(tmp_path / "tuned", tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    edit_json(tmp_path / "empty" / "config.json", {"num_hidden_layers": 1})
    variant.model("empty", tmp_path / "empty")
    variant.recipe("empty-cpu", model="empty")
    built = variant.built("library", "recipe=empty-cpu")
    assert [step.partition(":")[0] for step in built] == ["lower", "library"]
    variant.doit("quantize", "recipe=tuned-cpu")
    library = artifact(variant, "library", built[1].partition(":")[2]) / "model.so"
    with pytest.raises(MlcBuildError) as error:
        load(artifact(variant, "quantize", "tuned-q4f16_1"), library=library)
    text = str(error.value)
    assert "the library does not know the weights' model.layers.1." in text
    assert text.endswith("Use the library of the same structure and quantization")


def test_packages_of_one_structure_hold_one_library(tmp_path: Path, variant: Workspace) -> None:
    def digest(recipe: str) -> Any:
        manifest = json.loads((variant.root / "dist" / recipe / "manifest.json").read_text())
        (library,) = (name for name in manifest["files"] if name.endswith(".so"))
        return manifest["files"][library]

    variant.doit("build")
    assert digest("tiny-cpu") == digest("tuned-cpu")
    other = make_workspace(tmp_path / "other", variant.cache, tmp_path / "tuned")
    assert not [step for step in other.built("build") if step.startswith(("lower", "library"))], "in any workspace"
