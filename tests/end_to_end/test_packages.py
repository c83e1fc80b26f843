"""What a build leaves in dist/: the right numbers, the right files, the same bytes everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.runtime import load
from tests.end_to_end.workspace import Workspace, make_workspace, write_checkpoint
from tests.support import llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> tuple[Workspace, Any]:
    """A tied model in float16 on disk, in every quantization."""
    folder = tmp_path_factory.mktemp("tied")
    model = write_checkpoint(folder / "checkpoint", "float16", tie_word_embeddings=True, initializer_range=0.05)
    workspace = make_workspace(folder / "workspace", shared_cache, folder / "checkpoint")
    (workspace.root / "recipes/tiny-cpu.yaml").unlink()
    workspace.write(
        "recipes/matrix/all.yaml",
        "matrix:\n  model: [tiny]\n  quantization: [q0f32, q0f16, q4f16_1, q4f32_1]\n"
        "  target: [cpu, cpu-exact, cpu-x86_64]\n",
    )
    workspace.doit("build")
    return workspace, model


@pytest.mark.parametrize("target", ["cpu", "cpu-exact", "cpu-x86_64"])
@pytest.mark.parametrize("quantization", ["q0f32", "q0f16", "q4f16_1", "q4f32_1"])
def test_a_package_computes_what_its_weights_stand_for(
    tied: tuple[Workspace, Any], quantization: str, target: str
) -> None:
    workspace, model = tied
    package = load(workspace.root / "dist" / f"tiny-{quantization}-{target}")
    dtype = "float16" if "f16" in quantization else "float32"
    values = llama.mlc_parameters(model)
    if quantization.startswith("q4"):
        values = {name: llama.pack(v, dtype)[2] if v.ndim == 2 else v for name, v in values.items()}
    other = llama.with_parameters(llama.transformers_llama(**{**model.config.to_dict()}), values)
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 300, 100)]
    expected = llama.reference_logits(other, ids)
    difference = np.abs(package.logits(ids) - expected) / expected.std()
    if quantization.startswith("q4") and target != "cpu-exact":  # activations have 8 bits
        assert difference.max() < 1e-1
        assert difference.mean() < 1e-2
    else:
        assert difference.max() < (1e-4 if dtype == "float32" else 5e-3)
        assert difference.mean() < 1e-3


def test_the_package_has_what_the_runtimes_expect(tied: tuple[Workspace, Any]) -> None:
    folder = tied[0].root / "dist" / "tiny-q4f16_1-cpu"
    weights = folder / "tiny-q4f16_1-MLC"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "quality.json", "tiny-q4f16_1-MLC", "tiny-q4f16_1-cpu.so",
    ]  # fmt: skip
    assert sorted(path.name for path in weights.iterdir()) == [
        "mlc-chat-config.json", "ndarray-cache.json", "params_shard_0.bin", "tensor-cache.json", "tokenizer.json",
    ]  # fmt: skip
    index = json.loads((weights / "tensor-cache.json").read_text())
    assert index["records"][0]["format"] == "raw-shard"
    assert all(r["byteOffset"] % 64 == 0 for r in index["records"][0]["records"])
    config = json.loads((weights / "mlc-chat-config.json").read_text())
    assert config["model_type"] == "llama" and config["quantization"] == "q4f16_1" and config["version"] == "0.1.0"
    assert config["conv_template"]["name"] == "chatml"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"checkpoint", "files", "mlcbuild", "quality", "recipe", "size", "steps", "tools"} <= set(manifest)
    assert manifest["files"].keys() == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    } - {"manifest.json"}


def test_two_builds_in_two_fresh_folders_give_the_same_bytes(tmp_path: Path) -> None:
    """Nothing of the folder, the time or the order gets into a package."""
    found = []
    for name in ("one", "another/deeper"):
        folder = tmp_path / name
        write_checkpoint(folder / "checkpoint")
        workspace = make_workspace(folder / "workspace", folder / "cache", folder / "checkpoint")
        workspace.doit("build")
        found.append(workspace.digests("tiny-cpu"))
        for path in (workspace.root / "dist").rglob("*"):
            assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), path
    assert found[0] == found[1] and len(found[0]) == 8


def test_a_miss_with_gate_fail_installs_nothing(workspace: Workspace, tiny_checkpoint: Path) -> None:
    workspace.model("strict", tiny_checkpoint, "verify: {kl: 0.0000001, perplexity: 9000}\n")
    workspace.recipe("strict-cpu", model="strict")
    done = workspace.doit("build", "recipe=strict-cpu", check=False)
    assert done.returncode == 1
    assert "strict-q4f16_1 does not pass verification: KL divergence" in done.stdout + done.stderr
    assert not (workspace.root / "dist" / "strict-cpu").exists()
