"""Resolving and fetching from a hub, against a real HTTP server that answers as huggingface.co does."""

from __future__ import annotations

import datetime
import email.utils
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlcbuild.checkpoints import hub
from mlcbuild.errors import CheckpointError
from mlcbuild.recipes.types import LockedFile
from tests.checkpoints.hub_server import COMMIT, Fault, Hub, serving

SECRET = "hf_PlantedTokenThatNobodyMaySee"
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


def info(name: str) -> LockedFile:
    return LockedFile(hashlib.sha256(FILES[name]).hexdigest(), len(FILES[name]))


LOCKED = {name: info(name) for name in NEEDED}


@dataclass
class XetHub(Hub):
    """A hub whose weights are in Xet storage: hf_xet's own, in a folder."""

    storage: Path = Path()
    stored: str = ""  # the file's hash there
    broken: bool = False

    def answer(self, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        if path == f"/api/models/{self.repo}/xet-read-token/{COMMIT}" and not self.broken:
            names = {"Cas-Url": f"local://{self.storage}", "Access-Token": "xet", "Token-Expiration": "9999999999"}
            return 200, {f"X-Xet-{name}": value for name, value in names.items()}, b""
        status, found, body = super().answer(path, headers)
        if path.endswith("model.safetensors") and self.stored:
            route = f"{self.url}/api/models/{self.repo}/xet-read-token/{COMMIT}"
            found = {**found, "X-Xet-Hash": self.stored, "X-Xet-Refresh-Route": route}
            body = body if self.broken else bytes(len(body))  # not what was asked for
        return status, found, body


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
    text += "; build again, and if it stays so, `mlcbuild lock --update` shows what moved"
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
        f"hf:owner/name@{COMMIT[:12]}: model.safetensors: the repository has no such file at that revision"
    )


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


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited between attempts, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr("mlcbuild.checkpoints.hub_http._sleep", waited.append)
    return waited


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


WEIGHTS = "model.safetensors"


def test_a_download_goes_on_where_the_connection_broke(server: Hub, waits: list[float], tmp_path: Path) -> None:
    server.faults = [Fault(WEIGHTS, cut=100_000), Fault(WEIGHTS, cut=50_000)]
    seen: list[tuple[int, int]] = []
    hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out", lambda *numbers: seen.append(numbers))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    begun = [int(request.rpartition(" from ")[2]) for request in server.requests if " from " in request]
    assert begun == [100_000, 150_000]
    assert waits == [1, 1] and seen == sorted(seen)


def test_a_download_goes_on_in_the_next_build(server: Hub, waits: list[float], tmp_path: Path) -> None:
    server.faults = [Fault(WEIGHTS, cut=100_000), Fault(WEIGHTS, 503, times=99)]
    with pytest.raises(CheckpointError, match="the hub answers 503: try again later, 6 times in a row"):
        hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out", partial=tmp_path / "partial")
    assert not (tmp_path / "out").exists()
    server.faults.clear()
    server.requests.clear()
    hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out", partial=tmp_path / "partial")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {n: FILES[n] for n in NEEDED}
    assert server.requests == [f"GET /owner/name/resolve/{COMMIT}/{WEIGHTS} from 100000"]
    assert not (tmp_path / "partial").exists()


def test_a_damaged_beginning_is_given_up(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / LOCKED[WEIGHTS].sha256).write_bytes(bytes(1000))
    hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out", partial=tmp_path / "partial")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == FILES[WEIGHTS]


def test_a_hub_that_stops_in_the_middle(
    server: Hub, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    server.faults = [Fault(WEIGHTS, pause=2.0)]
    hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert server.requests[-1].endswith(f"{WEIGHTS} from 128000")


@dataclass
class Meeting(Hub):
    """A hub that sends each of two files only once both are asked for."""

    def __post_init__(self) -> None:
        self.both = threading.Barrier(2, timeout=20)

    def answer(self, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        if "/resolve/" in path:
            self.both.wait()
        return super().answer(path, headers)


def test_files_are_downloaded_side_by_side(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with serving(Meeting(dict(FILES))) as meeting:
        monkeypatch.setattr(constants, "ENDPOINT", meeting.url)
        two = {name: LOCKED[name] for name in (WEIGHTS, "tokenizer.json")}
        hub.fetch("owner/name", COMMIT, two, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {n: FILES[n] for n in two}


def test_a_refusal_ends_the_other_downloads(server: Hub, waits: list[float], tmp_path: Path) -> None:
    del server.files["tokenizer.json"]
    server.faults = [Fault(WEIGHTS, 503, {"Retry-After": "299"}, times=99)]
    with pytest.raises(CheckpointError, match=r"tokenizer.json: the repository has no such file at that revision"):
        hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out")
    assert not (tmp_path / "out" / WEIGHTS).exists()


@pytest.mark.parametrize("begun", [0, 100_000])
@pytest.mark.parametrize("broken", [False, True])
def test_files_in_xet_storage(
    server: Hub, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: int, broken: bool
) -> None:
    """They come from there, from where a download stopped; and from the hub itself where that fails."""
    import hf_xet
    from huggingface_hub import constants

    with hf_xet.XetSession().new_upload_commit(endpoint=f"local://{tmp_path / 'xet'}") as commit:
        upload = commit.start_upload_bytes(FILES[WEIGHTS])
    stored = upload.result().xet_info.hash
    place = tmp_path / "partial" / LOCKED[WEIGHTS].sha256
    place.parent.mkdir()
    place.write_bytes(FILES[WEIGHTS][:begun])
    with serving(XetHub(dict(FILES), storage=tmp_path / "xet", stored=stored, broken=broken)) as xet:
        monkeypatch.setattr(constants, "ENDPOINT", xet.url)
        hub.fetch("owner/name", COMMIT, {WEIGHTS: LOCKED[WEIGHTS]}, tmp_path / "out", partial=place.parent)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert waits == ([1] if broken else [])


def test_content_that_never_ends(server: Hub, tmp_path: Path) -> None:
    server.served[WEIGHTS] = FILES[WEIGHTS] * 2
    with pytest.raises(CheckpointError, match=r"bytes or more, recipes.lock says 256000; build again"):
        hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out")


def test_a_disk_without_room(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlcbuild.checkpoints.hub.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 0, 9))
    with pytest.raises(CheckpointError) as error:
        hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out", partial=tmp_path / "cache" / "partial")
    total = sum(file.size for file in LOCKED.values())
    assert str(error.value) == (
        f"hf:owner/name: {total:,} bytes are still to be downloaded, and the disk of {tmp_path / 'cache'} has 9 free: "
        "make room, or put the cache elsewhere (cache=DIR)"
    )
    assert not server.requests


def test_two_names_for_one_content(server: Hub, tmp_path: Path) -> None:
    server.files["vocab.json"] = FILES["tokenizer.json"]
    hub.fetch("owner/name", COMMIT, {**LOCKED, "vocab.json": info("tokenizer.json")}, tmp_path / "out")
    assert (tmp_path / "out/vocab.json").read_bytes() == (tmp_path / "out/tokenizer.json").read_bytes()


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


def test_the_token_goes_to_the_hub_and_not_where_it_redirects_to(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    server.token = SECRET
    with serving(XetHub(dict(FILES), stored="0" * 64, broken=True)) as storage:  # which asks for it
        there = storage.url.replace("127.0.0.1", "localhost") + f"/owner/name/resolve/main/{WEIGHTS}"
        server.faults = [Fault(WEIGHTS, 302, {"Location": there})]
        hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert set(server.tokens) == {f"Bearer {SECRET}"} and storage.tokens == [None]


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
