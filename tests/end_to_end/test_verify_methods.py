"""Verification of real builds: whole or layer by layer, the same figures; again when asked for; in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.smoke import checkpoint
from tests.end_to_end.workspace import Workspace, make_workspace
from tests.support import llama

pytestmark = pytest.mark.slow


def quality(workspace: Workspace, recipe: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((workspace.root / "dist" / recipe / "quality.json").read_text())
    return found


@pytest.mark.parametrize("quantization", ["q0f16", "q4f16_1", "q3f16_0"])  # nothing packed, words, words turned
def test_both_methods_agree(workspace: Workspace, tiny_checkpoint: Path, quantization: str) -> None:
    workspace.model("small", tiny_checkpoint, "verify: {gate: report, memory: 0}\n")
    for model in ("tiny", "small"):
        workspace.recipe(f"{model}-cpu", quantization, model)
    workspace.doit("build")
    whole, layers = quality(workspace, "tiny-cpu"), quality(workspace, "small-cpu")
    assert (whole["method"], layers["method"]) == ("whole", "layers")
    for name in ("kl", "top1_agreement", "perplexity", "reference_perplexity", "tokens", "status", "problems"):
        assert layers[name] == whole[name], name
    assert whole["library_executed"] and not layers["library_executed"]
    assert layers["static_checks"][0].startswith("file format: ELF")
    errors = layers["relative_error"]
    assert len(errors["tensors"]) == 2 * 4 + 2 and list(errors["blocks"]) == [
        "embedding", "layer 0", "layer 1", "final norm",
    ]  # fmt: skip
    exact = quantization == "q0f16"  # bfloat16 numbers of this size are float16 ones
    assert all((exact or error > 0) and error < 1 for error in errors["tensors"].values())


def test_verify_again(workspace: Workspace) -> None:
    """`-a` runs the steps of the recipe anew; what they give is what they gave."""
    workspace.doit("build")
    assert workspace.built("verify", "recipe=tiny-cpu") == []
    before = workspace.digests("tiny-cpu")
    assert "verify:tiny-cpu" in workspace.built("verify", "-a", "recipe=tiny-cpu")
    assert workspace.built("build") == []
    assert workspace.digests("tiny-cpu") == before


MEASURE = """
import json, re, sys
from pathlib import Path
from mlcbuild.errors import MlcBuildError
from mlcbuild.steps import measure
from mlcbuild.engine.job import Job, Places, Request

asked = json.loads(Path(sys.argv[1]).read_text())
measure.run(Job(Request.from_json(asked["request"]), Places.from_json(asked["places"])))
# VmHWM and not getrusage: that one also counts what the process that started this one had resident.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024)
"""


def peak_memory(workspace: Workspace, recipe: str, folder: Path) -> int:
    """Bytes that the measurement of the built recipe has resident at most, in a process of its own."""
    from mlcbuild.engine.run_step import make_places
    from mlcbuild.recipes.select import Selection
    from mlcbuild.workspace.session import Settings, open_session

    session = open_session(workspace.root, lambda event: None, Selection(recipe), Settings(workspace.cache))
    name = session.graph.goals[recipe].steps["measure"]
    folder.mkdir()
    request, places = session.builder.request(name), make_places(folder, session.store)
    asked = {"request": request.to_json(), "places": places.to_json()}
    (folder / "request.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder / "request.json")],
        capture_output=True, text=True, check=True, env=workspace.environment({}),
    )  # fmt: skip
    return int(done.stdout.split()[-1])


def test_the_memory_of_a_deep_model_is_that_of_a_layer(tmp_path: Path, shared_cache: Path) -> None:
    """20 layers of 28 MB as float32: whole, all of them are in memory; layer by layer, one."""
    config = {
        "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 20,
        "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 512, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "tie_word_embeddings": False,
    }  # fmt: skip
    folder = checkpoint.make(tmp_path, config, llama.architecture(), ("<|im_end|>", "<|im_start|>"))
    workspace = make_workspace(tmp_path / "workspace", shared_cache, folder)
    text = workspace.write("recipes/models/text.txt", "A text of some words.<|endoftext|>And another one.")
    workspace.model("deep", folder, f"verify: {{gate: report, memory: 0.1, text: {text.name}}}\n")
    workspace.model("whole", folder, f"verify: {{gate: report, text: {text.name}}}\n")
    for name in ("deep", "whole"):
        workspace.recipe(name, "q4f16_1", name)
    workspace.doit("build", "recipe=deep,whole")
    assert quality(workspace, "deep")["kl"] == quality(workspace, "whole")["kl"]
    memory = {name: peak_memory(workspace, name, tmp_path / f"measure-{name}") for name in ("deep", "whole")}
    assert memory["whole"] > 700e6  # 570 MB of float32, 80 MB of package
    assert memory["deep"] < 450e6  # of which 250 MB, whatever the model: NumPy, TVM's runtime, two KV caches
