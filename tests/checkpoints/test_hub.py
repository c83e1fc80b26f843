"""Resolving and fetching from a hub, against a real HTTP server that answers as huggingface.co does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlcbuild.checkpoints import hub
from mlcbuild.checkpoints.hub import FileInfo
from mlcbuild.errors import CheckpointError
from tests.checkpoints.hub_server import COMMIT, Hub, serving

CONFIG = {"model_type": "llama", "hidden_size": 8}
FILES = {
    "README.md": b"a card",
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b'{"model": {}}',
    "model.safetensors": bytes(range(256)) * 1000,
    "pytorch_model.bin": b"the same in another form",
    "original/model.safetensors": b"in a folder of its own",
}
NEEDED = ["config.json", "tokenizer.json", "model.safetensors"]


def info(name: str) -> FileInfo:
    return FileInfo(len(FILES[name]), hashlib.sha256(FILES[name]).hexdigest())


LOCKED = {name: info(name) for name in NEEDED}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and huggingface_hub pointed at it (it reads the environment once, when it is imported)."""
    from huggingface_hub import constants

    with serving(Hub(dict(FILES))) as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield made


def problem(repo: str = "owner/name", revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as error:
        hub.resolve(repo, revision)
    return str(error.value)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_resolve(server: Hub, revision: str | None) -> None:
    resolved = hub.resolve("owner/name", revision)
    assert resolved.commit == COMMIT
    assert resolved.config == CONFIG
    assert resolved.files == LOCKED
    assert not any("model.safetensors" in request for request in server.requests)  # its digest is in the listing


def test_sharded_weights_come_with_their_index() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    assert hub.needed_files(["config.json", "merges.txt", index, *shards, "x.gguf"], "r") == [
        "config.json",
        "merges.txt",
        *shards,
        index,
    ]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["model.safetensors"], "hf:a/b: no config.json; it is not a Hugging Face model repository"),
        (["config.json"], "hf:a/b: no model.safetensors and no model.safetensors.index.json"),
        (
            ["config.json", "pytorch_model.bin"],
            "hf:a/b: no model.safetensors and no model.safetensors.index.json; it has pytorch_model.bin, "
            "but PyTorch pickles are not read yet",
        ),
    ],
)
def test_repositories_that_cannot_be_built(names: list[str], text: str) -> None:
    with pytest.raises(CheckpointError) as error:
        hub.needed_files(names, "a/b")
    assert str(error.value) == text


def test_fetch(server: Hub, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    (tmp_path / "out").mkdir()
    hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {n: FILES[n] for n in NEEDED}
    total = sum(len(FILES[name]) for name in NEEDED)
    assert seen[-1] == (total, total) and seen == sorted(seen)


def test_fetch_takes_what_the_library_has_cached(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, hf_hub_download

    for name in NEEDED:
        hf_hub_download("owner/name", name, revision=COMMIT)
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not server.requests


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\0" * 256_000, "its sha256 is {digest}, recipes.lock says {locked}"),
        (b"short", "5 bytes, recipes.lock says 256000"),
    ],
)
def test_other_content_than_locked(server: Hub, tmp_path: Path, content: bytes, text: str) -> None:
    server.served["model.safetensors"] = content
    with pytest.raises(CheckpointError) as error:
        hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out")
    digest = hashlib.sha256(content).hexdigest()
    text = text.format(digest=digest, locked=LOCKED["model.safetensors"].sha256)
    assert str(error.value) == f"hf:owner/name@{COMMIT[:12]}: model.safetensors: {text}"
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x"])
def test_file_names_that_climb(server: Hub, tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as error:
        hub.fetch("owner/name", COMMIT, {name: info("config.json")}, tmp_path / "out")
    assert str(error.value) == f"hf:owner/name: file name {name!r} is refused: it would climb out of its folder"
    assert not server.requests


def test_a_file_that_is_gone(server: Hub, tmp_path: Path) -> None:
    del server.files["model.safetensors"]
    with pytest.raises(CheckpointError) as error:
        hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out")
    assert str(error.value) == (
        f"hf:owner/name@{COMMIT}: model.safetensors: the repository has no such file at that revision"
    )


def test_no_such_repository_revision_or_name(server: Hub) -> None:
    assert problem("owner/other") == "hf:owner/other: no such repository, or a private one (then set HF_TOKEN)"
    assert problem(revision="v9") == "hf:owner/name@v9: the repository has no such revision"
    assert problem("a/b/c").startswith("hf:a/b/c: not a repository name: ")


def test_private_and_gated_repositories(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "secret"
    assert problem() == "hf:owner/name: no such repository, or a private one (then set HF_TOKEN)"
    server.gated = True
    assert problem() == (
        "hf:owner/name: the repository is gated: accept its terms on the hub and set HF_TOKEN to a token of that "
        "account"
    )
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert hub.resolve("owner/name").files == LOCKED


def test_a_config_that_is_not_json(server: Hub) -> None:
    server.files["config.json"] = b"{"
    assert problem().startswith("hf:owner/name: config.json is not valid JSON: ")


def test_offline(server: Hub, tmp_path: Path) -> None:
    """The environment variables reach the library in a process of its own, as a step is."""
    code = """
import sys
from pathlib import Path
from mlcbuild.checkpoints import hub
from mlcbuild.errors import CheckpointError
try:
    print(hub.resolve("owner/name").commit)
    hub.fetch("owner/name", hub.resolve("owner/name").commit, {}, Path("."))
except CheckpointError as error:
    print(error)
"""
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}

    def run(**variables: str) -> str:
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment | variables, check=True, capture_output=True, text=True
        )
        return result.stdout.strip()

    assert run() == COMMIT
    assert run(HF_HUB_OFFLINE="1") == "hf:owner/name: not in the local cache, and HF_HUB_OFFLINE is set"
    assert run(HF_ENDPOINT="http://127.0.0.1:1").startswith("hf:owner/name: the hub cannot be reached: ")
