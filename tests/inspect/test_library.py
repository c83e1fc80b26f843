"""`mlcbuild inspect LIBRARY`: ours and mlc-ai's are recognised by `_metadata`, and it says whose weights they take."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.cli.main import main
from mlcbuild.models import architecture as architectures
from mlcbuild.models.parameters import parameters
from mlcbuild.quantization.schemes import quantized_parameters
from mlcbuild.recipes.load import load
from tests.engine.workspace import CONFIG, Workspace, make_workspace

HEADS = {"wasm": b"\0asm\1\0\0\0", "so": b"\x7fELF\2\1" + bytes(12) + b"\xb7\0"}
# As mlc_llm.interface.compile writes it (July 2026): these keys in this order, then the parameters.
METADATA = {
    "model_type": "llama",
    "quantization": "q4f16_1",
    "context_window_size": 4096,
    "sliding_window_size": -1,
    "attention_sink_size": -1,
    "prefill_chunk_size": 1024,
    "tensor_parallel_shards": 1,
    "pipeline_parallel_stages": 1,
    "disaggregation": False,
    "kv_state_kind": "kv_cache",
    "max_batch_size": 128,
    "active_vocab_size": None,
    "model_task": "chat",
}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    made = make_workspace(tmp_path)
    monkeypatch.chdir(made.root)
    return made


def parameters_of(config: dict[str, Any], quantization: str) -> list[dict[str, Any]]:
    catalog = load(Path(__file__).parents[2])
    structure = architectures.resolve(architectures.choose(catalog.architectures, config), config, {})
    made = quantized_parameters(parameters(structure), catalog.quantizations[quantization])
    return [{"name": p.name, "shape": [*p.shape], "dtype": p.dtype, "preprocs": []} for p in made]


def library(path: Path, params: list[dict[str, Any]], vocab: str | int = "vocab_size", **changes: Any) -> Path:
    """A file with the metadata of mlc-ai's own: the vocabulary is a name now, and was -1 in 2024."""
    vocabulary = CONFIG["vocab_size"]
    open_ = [{**p, "shape": [vocab if n == vocabulary else n for n in p["shape"]]} for p in params]
    text = json.dumps({**METADATA, **changes, "params": open_}).encode()
    path.write_bytes(HEADS[path.suffix[1:]].ljust(600, b"\0") + text + b"\0more")
    return path


def inspected(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["inspect", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("vocab", ["vocab_size", -1])
def test_mlc_ais_library_takes_the_weights_of_a_recipe(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], vocab: str | int
) -> None:
    path = library(workspace.root / "theirs.wasm", parameters_of(CONFIG, "q4f16_1"), vocab)
    said = inspected(capsys, "theirs.wasm")
    assert "library       theirs.wasm: WebAssembly, " in said
    assert "model_type    llama, quantization q4f16_1, task chat" in said
    assert "takes         the weights of these recipes:\n              tiny-q4f16_1  tiny-q4f16_1-cpu\n" in said
    packed = path.with_name("packed.so")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert "packed.so: WebAssembly, gzip, " in inspected(capsys, "packed.so")
    found = json.loads(inspected(capsys, "theirs.wasm", "--json"))
    assert found["takes"] == {"quantize:tiny-q4f16_1": ["tiny-q4f16_1-cpu"]} and found["max_batch_size"] == 128


def test_a_library_of_another_structure_takes_none(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    library(workspace.root / "deeper.so", parameters_of({**CONFIG, "num_hidden_layers": 3}, "q4f16_1"))
    assert "takes         the weights of no recipe of this workspace" in inspected(capsys, "deeper.so")


def test_the_first_difference_to_named_weights_is_an_error(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    from tests.runtime.tiny_llama import write_weights

    params = parameters_of(CONFIG, "q0f32")
    weights = {p["name"]: np.zeros(p["shape"], p["dtype"]) for p in params}
    folder = workspace.root / "weights-MLC"
    folder.mkdir()
    write_weights(folder, weights)
    library(workspace.root / "theirs.so", params)
    assert f"              those of {folder.name}" in inspected(capsys, "theirs.so", "--weights", "weights-MLC")
    library(workspace.root / "wider.so", parameters_of({**CONFIG, "intermediate_size": 160}, "q0f32"))
    assert main(["inspect", "wider.so", "--weights", "weights-MLC"]) == 1
    assert (
        "wider.so does not fit weights-MLC: the library wants model.layers.0.mlp.gate_up_proj.weight [320, 64] "
        "float32, the weights hold model.layers.0.mlp.gate_up_proj.weight [256, 64] float32. "
        "Use the library of the same structure and quantization"
    ) in capsys.readouterr().err


def test_what_is_no_library(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace.root / "x.so").write_bytes(HEADS["so"])
    assert main(["inspect", "x.so"]) == 1
    assert "x.so: no `_metadata` in it, so this is not a library of a language model" in capsys.readouterr().err
    assert main(["inspect", "tiny", "--weights", "."]) == 1
    assert "--weights is for a library" in capsys.readouterr().err
