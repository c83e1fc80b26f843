"""`mlcbuild new`: the file that it writes, what it refuses, what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mlcbuild.cli.main import main
from mlcbuild.recipes.load import check, load
from mlcbuild.recipes.lockfile import read_lock
from tests.checkpoints.hub_server import COMMIT, Fault, Hub, serving
from tests.engine.workspace import Workspace, make_workspace
from tests.inspect.test_inspect import BERT, STORIES

NEXT = "f" * 40


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    made = make_workspace(tmp_path)
    monkeypatch.chdir(made.root)
    return made


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    files = {path.name: path.read_bytes() for path in STORIES.iterdir() if path.suffix in (".json", ".safetensors")}
    with serving(Hub({**files, "README.md": b"a card"}, repo="Owner/Tale-1.5_Chat")) as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("mlcbuild.checkpoints.hub_http._sleep", lambda _: None)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield made


def test_a_folder(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", str(STORIES), "--name", "tale", "--memory", "2M"]) == 0
    said = capsys.readouterr().out.splitlines()
    path = workspace.root / "recipes/models/tale.yaml"
    assert said[0] == "wrote      recipes/models/tale.yaml"
    assert said[-1] == "next       doit build recipe=tale-cpu"
    assert check(workspace.root).ok
    model = load(workspace.root).models["tale"]
    assert model.source.path == STORIES and model.template == "chatml"
    text = path.read_text()
    assert "# llama, 2,755,008 parameters, 6 layers, a context of 512 tokens (llama-" in text
    assert "#   q3f16_1   1.3 MB + 786.4 kB for 512 tokens" not in text, "2 MB hold one of the two only"
    assert "(2.0 MB do not hold " in text and "the smallest is q3f16_" in text


def test_nothing_is_overwritten(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    before = (workspace.root / "recipes/models/tiny.yaml").read_text()
    assert main(["new", str(STORIES), "--name", "tiny"]) == 1
    assert "recipes/models/tiny.yaml is there already; nothing was written" in capsys.readouterr().err
    assert (workspace.root / "recipes/models/tiny.yaml").read_text() == before
    assert main(["new", str(STORIES)]) == 1
    assert "a model `stories` comes with mlcbuild" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--name", "a/b"], "--name a/b: a name is letters, digits"),
        (["--name", "x", "--template", "chatmll"], "no template is named `chatmll`; did you mean `chatml`?"),
        (["--name", "x", "--memory", "much"], "'much' is not a size"),
    ],
)
def test_mistakes(workspace: Workspace, capsys: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    assert main(["new", str(STORIES), *words]) == 1
    assert text in capsys.readouterr().err
    assert not (workspace.root / "recipes/models/x.yaml").exists()


def test_a_template_that_was_chosen_is_checked(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", str(STORIES), "--name", "tale", "--template", "llama-2"]) == 0
    said = capsys.readouterr().out
    assert "note       template: it writes conversations otherwise:\n           --- tokenizer_config.json" in said
    assert load(workspace.root).models["tale"].template == "llama-2"


def test_a_dry_run_writes_nothing(workspace: Workspace, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", hub.repo, "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out.partition("note ")[0])["source"] == {"hf": hub.repo}
    assert read_lock(workspace.root) == {} and len([*(workspace.root / "recipes/models").glob("*.yaml")]) == 1


@pytest.mark.slow
def test_a_repository_is_locked_and_its_weights_are_not_fetched(
    workspace: Workspace, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", hub.repo]) == 0
    said = capsys.readouterr().out
    assert "wrote      recipes/models/tale-1.5_chat.yaml" in said
    assert f"locked     hf:{hub.repo} at {COMMIT[:12]}, " in said
    assert "note       the weights were not looked at" in said
    model = load(workspace.root).models["tale-1.5_chat"]
    assert (model.source.hf, model.template) == (hub.repo, "chatml")
    assert read_lock(workspace.root)[hub.repo].commit == COMMIT
    assert not any("safetensors" in request or "README" in request for request in hub.requests)
    # What is locked is inspected at that commit, wherever the branch is now, and the lock stays.
    hub.move(NEXT, {**hub.files, "config.json": b"{}"})
    hub.requests.clear()
    assert main(["inspect", "tale-1.5_chat"]) == 0
    said = capsys.readouterr().out
    assert f"commit        {COMMIT[:12]} (as locked)" in said and "tokenizer     2,048 tokens" in said
    assert hub.requests and all(COMMIT in request for request in hub.requests)
    assert main(["new", hub.repo, "--name", "again"]) == 0
    assert "locked" not in capsys.readouterr().out
    hub.faults = [Fault("tokenizer.json", 404, times=9)]
    assert main(["inspect", "again"]) == 0
    assert "tokenizer     not looked at: hf:Owner/Tale" in capsys.readouterr().out


@pytest.mark.slow
def test_a_difference_and_an_adapter(workspace: Workspace, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", str(STORIES), "--name", "sum", "--delta-of", hub.repo]) == 0
    assert f"locked     hf:{hub.repo} at {COMMIT[:12]}, " in capsys.readouterr().out
    adapter = workspace.write("adapter/adapter_config.json", "{}").parent
    assert main(["new", hub.repo, "--name", "tuned", "--lora", str(adapter)]) == 0
    assert check(workspace.root).ok
    models = load(workspace.root).models
    assert str(models["sum"].delta_of) == f"hf:{hub.repo}" and models["sum"].source.path == STORIES
    assert models["tuned"].lora is not None and models["tuned"].lora.path == adapter
    capsys.readouterr()
    assert main(["new", str(STORIES), "--name", "x", "--delta-of", "a/b", "--lora", "a/b"]) == 1
    assert "--delta-of and --lora: one of the two" in capsys.readouterr().err
    assert main(["new", str(STORIES), "--name", "x", "--delta-of", "./nowhere"]) == 1
    assert "./nowhere: no such folder" in capsys.readouterr().err
    assert not (workspace.root / "recipes/models/x.yaml").exists()


def test_an_architecture_that_is_not_supported(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.write("strange/config.json", json.dumps({"model_type": "lama", "hidden_size": 64, "wings": 2}))
    assert main(["new", "strange"]) == 1
    said = capsys.readouterr().err
    assert "model_type `lama` is an unknown architecture (did you mean `llama`?)" in said and "`wings`" in said
    assert not (workspace.root / "recipes/models/strange.yaml").exists()


def test_a_revision_is_in_the_file(workspace: Workspace, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", hub.repo, "--revision", "main"]) == 0
    assert (load(workspace.root).models["tale-1.5_chat"].source.revision) == "main"
    assert read_lock(workspace.root).keys() == {f"{hub.repo}@main"}


def test_a_hub_that_refuses(workspace: Workspace, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.token, hub.gated = "hf_something", True
    assert main(["new", hub.repo]) == 1
    assert "the repository is gated: accept its terms" in capsys.readouterr().err
    assert len([*(workspace.root / "recipes/models").glob("*.yaml")]) == 1


def test_inspecting_a_repository_locks_nothing(
    workspace: Workspace, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", hub.repo, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["commit"], found["locked"], found["tensors"]) == (COMMIT, False, None)
    assert read_lock(workspace.root) == {}


def test_a_lock_file_that_was_edited(workspace: Workspace, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """FAULTS A4: what is inspected is the locked config, which is compared with the file at the locked commit."""
    assert main(["new", hub.repo]) == 0
    lock = workspace.root / "recipes" / "recipes.lock"
    document = json.loads(lock.read_text())
    document["repos"][hub.repo]["config"]["hidden_size"] = 7
    lock.write_text(json.dumps(document))
    assert main(["inspect", "tale-1.5_chat"]) == 1
    assert f"recipes.lock: the config of hf:{hub.repo} is not that of the locked commit: `hidden_size` is 7, and " in (
        capsys.readouterr().err
    )


def test_a_model_of_texts_needs_no_advice_on_templates(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """FAULTS C: nobody talks to it."""
    workspace.write("texts/config.json", json.dumps(BERT))
    workspace.write("texts/tokenizer.json", (STORIES / "tokenizer.json").read_text())
    workspace.write("texts/tokenizer_config.json", json.dumps({"chat_template": "{{ messages[0].content }}"}))
    for words in ([], ["--template", "llama-2"]):
        assert main(["new", "texts", *words, "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert "note       template" not in said and "weights do not fit: no weights" in said
