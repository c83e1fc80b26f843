"""Fetching from a hub: what goes on, what is given up, where files come from."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlcbuild.checkpoints import hub
from mlcbuild.errors import CheckpointError
from tests.checkpoints.hub_server import COMMIT, Fault, Hub, serving
from tests.checkpoints.small_hub import FILES, LOCKED, NEEDED, SECRET, WEIGHTS, info


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
