"""`mlcbuild lock`: what it writes, what it leaves alone, and how it says what moved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.load import load
from mlcbuild.recipes.lockfile import read_lock
from mlcbuild.text import amount
from mlcbuild.workspace.hub_locks import lock_models
from tests.checkpoints.hub_server import COMMIT, Fault, Hub, serving
from tests.engine.workspace import CONFIG, Workspace, make_workspace

NEXT = "f" * 40
FILES = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"w" * 1500, "tokenizer.json": b"{}"}
SIZE = f"3 files, {amount(sum(map(len, FILES.values())))}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with serving(Hub(dict(FILES))) as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield made


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = make_workspace(tmp_path / "workspace")
    made.write("recipes/models/tiny.yaml", "source: {hf: owner/name}\ntemplate: chatml\n")
    return made


def run(workspace: Workspace, *names: str, update: bool = False) -> list[str]:
    said: list[str] = []
    lock_models(load(workspace.root), workspace.root / "cache", names, update, said.append)
    return said


def test_a_repository_is_locked_once(workspace: Workspace, hub: Hub) -> None:
    assert run(workspace) == [f"locked     owner/name  {COMMIT[:12]}  {SIZE}"]
    (entry,) = read_lock(workspace.root).values()
    assert entry.commit == COMMIT and entry.config == CONFIG and entry.files.keys() == FILES.keys()
    hub.move(NEXT, {**FILES, "model.safetensors": b"v" * 1500})
    hub.requests.clear()
    assert run(workspace, "tin?") == [f"kept       owner/name  {COMMIT[:12]}  {SIZE}"]
    assert not hub.requests


def test_an_update_shows_what_moved(workspace: Workspace, hub: Hub) -> None:
    run(workspace)
    assert run(workspace, update=True) == [f"unchanged  owner/name  {COMMIT[:12]}  {SIZE}"]
    config = json.dumps({**CONFIG, "rope_theta": 5e5, "hidden_size": 8}).encode()
    hub.move(NEXT, {"config.json": config, "model.safetensors": b"v" * 1500, "merges.txt": b"m" * 20})
    moved, *lines = (line.strip() for line in run(workspace, "tiny", update=True))
    assert moved == f"moved      owner/name  {COMMIT[:12]} -> {NEXT[:12]}"
    before = len(FILES["config.json"])
    assert lines == [
        f"changed  config.json  {before:,} -> {len(config):,} bytes",
        "added    merges.txt  20 B",
        "changed  model.safetensors  1.5 kB",
        "removed  tokenizer.json  2 B",
        "config   hidden_size: 64 -> 8",
        "config   rope_theta: 500000.0 (new)",
    ]
    assert read_lock(workspace.root)["owner/name"].commit == NEXT


def test_a_base_and_an_adapter_are_locked_with_their_model(workspace: Workspace, hub: Hub) -> None:
    (workspace.root / "checkpoint").mkdir()
    text = "source: {path: ../../checkpoint}\ntemplate: chatml\n"
    workspace.write("recipes/models/tiny.yaml", f"{text}delta_of: {{hf: owner/name}}\n")
    assert run(workspace)[0].startswith("locked     owner/name ")
    hub.files = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"x"}
    workspace.write("recipes/models/tiny.yaml", f"{text}lora: {{hf: owner/name, revision: main}}\n")
    assert run(workspace) == [f"locked     owner/name@main  {COMMIT[:12]}  2 files, 22 B"]
    assert read_lock(workspace.root)["owner/name@main"].config == {"peft_type": "LORA"}


def test_everything_is_tried_before_what_is_wrong_is_said(workspace: Workspace, hub: Hub) -> None:
    workspace.write("recipes/models/other.yaml", "source: {hf: owner/other}\ntemplate: chatml\n")
    with pytest.raises(MlcBuildError) as error:
        run(workspace, "other", "tiny")
    assert str(error.value).startswith("hf:owner/other: there is no repository of this name ")
    assert read_lock(workspace.root).keys() == {"owner/name"}


def test_names_that_match_nothing(workspace: Workspace, hub: Hub) -> None:
    with pytest.raises(MlcBuildError) as error:
        run(workspace, "tinny", "x*")
    assert str(error.value) == (
        "no model is named `tinny`; did you mean `tiny`?\nno model is named `x*`; `recipes/models/` has them"
    )
    workspace.write("recipes/models/tiny.yaml", "source: {path: .}\ntemplate: chatml\n")
    with pytest.raises(MlcBuildError, match="nothing to lock: these models are not on a hub"):
        run(workspace, "tiny")
    with pytest.raises(MlcBuildError, match="nothing to lock: the models of the recipes are not on a hub"):
        run(workspace)


def test_a_hub_that_fails_leaves_the_lock_file_alone(
    workspace: Workspace, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(workspace)
    monkeypatch.setattr("mlcbuild.checkpoints.hub_http._sleep", lambda _: None)
    hub.faults = [Fault("owner/name", 500, times=99)]
    with pytest.raises(MlcBuildError, match="the hub answers 500"):
        run(workspace, update=True)
    assert read_lock(workspace.root)["owner/name"].commit == COMMIT
