"""Resolving a repository, against a real HTTP server that answers as huggingface.co does."""

from __future__ import annotations

import datetime
import email.utils
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from mlcbuild.checkpoints import hub
from mlcbuild.errors import CheckpointError
from tests.checkpoints.hub_server import COMMIT, Fault, Hub
from tests.checkpoints.small_hub import CONFIG, LOCKED, SECRET, problem


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
    ("names", "weights"),
    [
        (["pytorch_model.bin", "model.safetensors"], ["model.safetensors"]),
        (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
        (
            [f"pytorch_model-0000{i}-of-00002.bin" for i in (2, 1)] + ["pytorch_model.bin.index.json", "optimizer.bin"],
            [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)] + ["pytorch_model.bin.index.json"],
        ),
        (["RWKV-4-World-0.1B.pth", "README.md"], ["RWKV-4-World-0.1B.pth"]),
    ],
)
def test_weights_are_fetched_in_one_form(names: list[str], weights: list[str]) -> None:
    assert hub.needed_files(["config.json", *names], "a/b") == ["config.json", *weights]


def test_an_adapter_has_its_own_files() -> None:
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert hub.needed_files([*files, "adapter_model.bin", "tokenizer.json", "README.md"], "a/b") == files
    assert hub.needed_files(["adapter_config.json", "adapter_model.bin"], "a/b")[1] == "adapter_model.bin"


NO_WEIGHTS = (
    "hf:a/b: no weights: neither model.safetensors nor model.safetensors.index.json, pytorch_model.bin nor "
    "pytorch_model.bin.index.json"
)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["model.safetensors"], "hf:a/b: no config.json; it is not a Hugging Face model repository"),
        (["config.json"], NO_WEIGHTS),
        (["config.json", "one.pth", "two.pth"], NO_WEIGHTS),
        (
            ["adapter_config.json"],
            "hf:a/b: an adapter without weights: no adapter_model.safetensors and no adapter_model.bin",
        ),
    ],
)
def test_repositories_that_cannot_be_built(names: list[str], text: str) -> None:
    with pytest.raises(CheckpointError) as error:
        hub.needed_files(names, "a/b")
    assert str(error.value) == text


def test_missing_private_and_gated_are_three_errors(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    page = f"{server.url}/owner/name"
    assert problem("owner/other") == (
        f"hf:owner/other: there is no repository of this name that everybody may read: see {server.url}/owner/other"
    )
    assert problem(revision="v9") == (
        f"hf:owner/name@v9: the repository has no such revision: its branches and tags are on {page}"
    )
    assert problem("a/b/c").startswith("hf:a/b/c: not a repository name: ")
    server.token = SECRET
    assert problem() == (
        "hf:owner/name: the repository is private, or its name is wrong: set HF_TOKEN to a token that may read it, "
        f"or correct the name ({page})"
    )
    server.gated = True
    assert problem() == (
        f"hf:owner/name: the repository is gated: accept its terms on {page} "
        "and set HF_TOKEN to a token of that account"
    )
    monkeypatch.setenv("HF_TOKEN", "another")
    assert problem() == (
        "hf:owner/name: the repository is gated, and the account of your token may not read it: "
        f"ask for access on {page}"
    )
    server.gated = False
    assert problem() == "hf:owner/name: the hub refuses the token: renew HF_TOKEN, or run `hf auth login`"
    server.faults = [Fault("name", 403), Fault("name", 404), Fault("name", 418)]
    assert problem() == (
        "hf:owner/name: the token may not read the repository: give it that permission, or use another"
    )
    assert problem() == f"hf:owner/name: there is no repository of this name that this token may read: see {page}"
    assert problem() == "hf:owner/name: the hub answers 418"
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert hub.resolve("owner/name").files == LOCKED


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_hub_that_recovers(server: Hub, waits: list[float], tmp_path: Path, status: int) -> None:
    server.faults = [Fault("owner/name", status, times=2), Fault("config.json", status, {"Retry-After": "7"})]
    assert hub.resolve("owner/name").files == LOCKED
    assert waits == [1, 2, 7]
    server.faults = [Fault("model.safetensors", status, {"RateLimit": '"resolvers";r=0;t=42'})]
    hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out")
    assert waits[3:] == [42]


def test_a_hub_that_gives_a_date(server: Hub, waits: list[float]) -> None:
    later = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60))
    server.faults = [Fault("owner/name", 503, {"Retry-After": later})]
    hub.resolve("owner/name")
    assert 55 < waits[0] <= 60


def test_a_hub_that_does_not_recover(server: Hub, waits: list[float]) -> None:
    server.faults = [Fault("owner/name", 500, times=99)]
    assert problem() == "hf:owner/name: the hub answers 500: try again later, 6 times in a row"
    assert waits == [1, 2, 4, 8, 16]
    server.faults = [Fault("owner/name", 429, {"Retry-After": "3600"}, times=99)]
    assert problem() == (
        "hf:owner/name: the hub answers 429, too many requests (it asks to wait 3600 seconds); "
        "with a token (HF_TOKEN) it allows more"
    )
    assert len(waits) == 5


def test_an_address_without_a_hub(server: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert problem().startswith("hf:owner/name: the hub cannot be reached: ")
    assert waits == [1, 2]
    monkeypatch.setattr(constants, "ENDPOINT", f"{server.url}/{server.repo}/resolve/main/README.md?")
    assert problem() == "hf:owner/name: the hub's answer is not JSON: is HF_ENDPOINT the address of a hub?"


@pytest.mark.parametrize("token", [SECRET, f"{SECRET}\x00x", f"{SECRET}é"])
def test_the_token_is_in_no_message(
    server: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even where a library complains about the header that it is in."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    server.faults = [Fault("name", 401), Fault("name", 403), Fault("name", 404)]
    for _ in server.faults:
        with pytest.raises(CheckpointError) as error:
            hub.resolve("owner/name")
        shown = "".join(traceback.format_exception(error.value))
        assert token == SECRET or str(error.value).endswith(
            "is not a token: it has other characters than letters and digits"
        )
        assert SECRET not in shown, shown
    assert SECRET not in caplog.text


def test_a_config_that_is_not_json(server: Hub) -> None:
    server.files["config.json"] = b"{"
    assert problem().startswith("hf:owner/name: config.json is not valid JSON: ")


@pytest.mark.slow
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
    assert run(HF_HUB_OFFLINE="1") == (
        "hf:owner/name: not in the local cache, and HF_HUB_OFFLINE is set: unset it to download"
    )
    assert run(HF_ENDPOINT="http://127.0.0.1:1").startswith("hf:owner/name: the hub cannot be reached: ")
