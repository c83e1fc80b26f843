"""Models that are merged from two checkpoints become steps that fetch both."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.engine.graph import Graph
from mlcbuild.planning.planner import plan
from mlcbuild.recipes.load import load
from mlcbuild.recipes.lockfile import key
from mlcbuild.recipes.types import Locked, LockedFile, Model
from tests.engine.workspace import CONFIG, Workspace, make_workspace

FILES = {"config.json": LockedFile("0" * 64, 10), "model.safetensors": LockedFile("1" * 64, 20)}


def lock(model: Model) -> Locked:
    return Locked((key(model.source)[-1] * 40), CONFIG, FILES)


def planned(workspace: Workspace, text: str) -> Graph:
    workspace.write("recipes/models/tiny.yaml", f"{text}\ntemplate: chatml\n")
    catalog = load(workspace.root)
    return plan(catalog, [catalog.recipes["tiny-q4f16_1-cpu"]], lock)


def test_a_delta_and_its_base(tmp_path: Path) -> None:
    found = planned(make_workspace(tmp_path), "source: {hf: owner/a}\ndelta_of: {hf: owner/b}")
    assert list(found.goals["tiny-q4f16_1-cpu"].steps)[:3] == ["download", "base", "convert"]
    assert found.steps["download:tiny"].fields["commit"] == "a" * 40
    assert found.steps["download:tiny-base"].fields["commit"] == "b" * 40
    convert = found.steps["convert:tiny"]
    assert [(item.name, item.step) for item in convert.inputs] == [
        ("checkpoint", "download:tiny"),
        ("base", "download:tiny-base"),
    ]
    assert "tokenizer.json" not in convert.inputs[1].select


def test_an_adapter_in_a_folder(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    folder = workspace.write("recipes/models/adapter/adapter_config.json", "{}").parent
    found = planned(workspace, "source: {hf: owner/a}\nlora: {path: adapter}")
    (files,) = found.steps["download:tiny-lora"].inputs
    assert files.path == folder
    assert files.select == ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    convert = found.steps["convert:tiny"]
    assert convert.inputs[1].name == "lora"
    # What convert compares with the files, once they are here (FAULTS.md A4).
    assert convert.fields["config"] == CONFIG and convert.fields["base"] == "owner/a"


@pytest.mark.parametrize(
    ("adapter", "untied"),
    [
        ({"modules_to_save": ["lm_head"]}, True),
        ({"modules_to_save": ["model.embed_tokens", "score"]}, True),
        ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, False),
        ({"modules_to_save": ["tokens"], "target_modules": ["lm_head"]}, False),
        ({"modules_to_save": None}, False),
        ({"modules_to_save": "lm_head"}, False),
        ([], None),
    ],
)
def test_an_adapter_that_unties(tmp_path: Path, adapter: Any, untied: bool | None) -> None:
    """FAULTS A6: package, library and weights have two tensors where the adapter makes two."""
    workspace = make_workspace(tmp_path)
    workspace.write("recipes/models/adapter/adapter_config.json", json.dumps(adapter))
    workspace.write("recipes/models/tiny/config.json", json.dumps({**CONFIG, "tie_word_embeddings": True}))
    found = planned(workspace, "source: {path: tiny}\nlora: {path: adapter}")
    if untied is None:
        (said,) = found.broken.values()
        assert said.endswith("adapter/adapter_config.json: expected a JSON object, got list")
        return
    fields = found.steps["convert:tiny"].fields
    assert fields.get("untied", False) == untied and fields["structure"]["tie_word_embeddings"] != untied
    assert ("lm_head" in {rule["role"] for rule in fields["structure"]["rules"]}) == untied
    (package,) = (step for step in found.steps.values() if step.kind == "package")
    assert package.fields["model_config"]["tie_word_embeddings"] != untied


def test_the_folder_above(tmp_path: Path) -> None:
    """FAULTS C: `the step ended well but made nothing`. What a training run leaves has a folder for each checkpoint."""
    workspace = make_workspace(tmp_path)
    folder = workspace.root / "recipes/models/run"
    folder.mkdir()
    lora = "source: {path: tiny}\nlora: {path: run}"

    def said(text: str) -> str:
        (found,) = planned(workspace, text).broken.values()
        return found

    expected = f"model tiny: lora: {folder}: no adapter_config.json: an adapter in PEFT's format has one"
    assert said(lora) == expected
    for name in ("checkpoint-9", "checkpoint-10"):
        workspace.write(f"recipes/models/run/{name}/adapter_config.json", "{}")
        workspace.write(f"recipes/models/run/{name}/config.json", "{}")
    assert said(lora) == f"{expected}; the folder checkpoint-10/ has it: name that one"
    assert said("source: {path: run}") == (
        f"model tiny: {folder}/config.json: no such file: a checkpoint in Hugging Face format has one; the folder "
        "checkpoint-10/ has it: name that one"
    )


def test_what_is_no_config(tmp_path: Path) -> None:
    """FAULTS D: a fifo waits for ever, and a link to /dev/zero has no end."""
    workspace = make_workspace(tmp_path)
    config = workspace.root / "recipes/models/tiny/config.json"
    config.write_text(config.read_text() + " " * (4 << 20))
    (text,) = planned(workspace, "source: {path: tiny}").broken.values()
    assert text.endswith(f"config.json: {config.stat().st_size:,} bytes; a config.json has at most 4,194,304")
    for fifo in (True, False):
        config.unlink()
        os.mkfifo(config) if fifo else config.symlink_to("/dev/zero")
        (text,) = planned(workspace, "source: {path: tiny}").broken.values()
        assert text == f"model tiny: {config}: cannot be read: it is not a regular file"


def test_weights_in_a_folder_of_their_own(tmp_path: Path) -> None:
    """FAULTS C: it was `no weights`, though there are some."""
    workspace = make_workspace(tmp_path)
    folder = workspace.write("recipes/models/other/config.json", json.dumps(CONFIG)).parent
    workspace.write("recipes/models/other/shards/model-00001-of-00002.safetensors", "")
    assert planned(workspace, "source: {path: other}").broken == {
        "tiny-q4f16_1-cpu": f"model tiny: {folder}: no weights beside config.json: they lie in the folder shards/: "
        "move them, with their index, to config.json, or name the folder that has both as the source"
    }


def test_pickles_count_only_where_there_are_no_safetensors(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    folder = workspace.write("recipes/models/other/config.json", json.dumps(CONFIG)).parent
    (folder / "pytorch_model.bin").write_bytes(b"")
    (files,) = planned(workspace, "source: {path: other}").steps["download:tiny"].inputs
    assert {"pytorch_model*.bin", "*.pth"} <= {*files.select}
    (folder / "model.safetensors").write_bytes(b"")
    (files,) = planned(workspace, "source: {path: other}").steps["download:tiny"].inputs
    assert not {"pytorch_model*.bin", "*.pth"} & {*files.select}
