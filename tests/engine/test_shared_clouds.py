"""The shared cache on Google Cloud Storage and in a repository of a hub, both on loopback (S3: test_shared.py)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.hub_server import Fault, serving
from tests.checkpoints.hub_writes import WritableHub
from tests.doit_face.test_doit import ALL
from tests.engine import gs_server
from tests.engine.gs_server import BUCKET, Server
from tests.engine.test_shared import said
from tests.engine.workspace import Workspace, make_workspace
from tests.workspace.test_maintenance import mlcbuild

GIVEN = sum(ALL.values())  # steps whose results are shared
CACHE = "datasets/me/cache"
PLACE = f"remote=hf://{CACHE}/below"


@pytest.fixture
def other(tmp_path: Path) -> Workspace:
    """The same recipes and checkpoint on another machine."""
    return make_workspace(tmp_path / "other")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = gs_server.start()
    yield server
    server.stop()


@pytest.fixture
def bucket() -> str:
    return f"gs://{BUCKET}/{time.monotonic_ns()}"


@pytest.mark.slow
def test_through_gs(workspace: Workspace, other: Workspace, server: Server, bucket: str) -> None:
    output = workspace.doit(f"remote={bucket}", "remote_write=1", **server.environment)
    assert "shared cache" not in output and "bucket" not in output, output
    assert workspace.ran() == ALL
    output = other.doit("-n", "2", f"remote={bucket}", **server.environment)
    assert other.ran() == {}, output
    assert said(output, "from the shared cache") == GIVEN
    assert other.digests() == workspace.digests()


@pytest.mark.slow
def test_gs_from_processes(workspace: Workspace, other: Workspace, server: Server, bucket: str) -> None:
    parallel = ("-n", "2", "-P", "process", f"remote={bucket}")
    workspace.doit(*parallel, "remote_write=1", **server.environment)
    output = other.doit(*parallel, **server.environment)
    assert said(output, "cannot be") == 0, output
    assert other.ran() == {}


@pytest.mark.slow
def test_a_damaged_blob_on_gs_is_never_taken_and_is_mended(
    workspace: Workspace, other: Workspace, server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gcsfs.core import GCSFileSystem

    workspace.doit(f"remote={bucket}", "remote_write=1", **server.environment)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    gs = GCSFileSystem(endpoint_url=server.environment["STORAGE_EMULATOR_HOST"], token="anon")
    for name in gs.find(f"{bucket.removeprefix('gs://')}/cas"):
        gs.pipe_file(name, b"x" * gs.info(name)["size"])
    output = other.doit(f"remote={bucket}", "remote_write=1", **server.environment)
    assert other.ran() == ALL
    assert "is damaged (blob " in output
    assert other.digests() == workspace.digests()
    third = make_workspace(other.root.parent / "third")
    output = third.doit(f"remote={bucket}", **server.environment)
    assert third.ran() == {}, output


@pytest.mark.slow
def test_a_gs_bucket_with_nothing_is_said_once(workspace: Workspace, server: Server, bucket: str) -> None:
    output = workspace.doit(f"remote={bucket}", **server.environment)
    assert said(output, f"{bucket}: there is nothing at all") == 1
    assert workspace.ran() == ALL


@pytest.mark.slow
def test_gs_that_is_down_is_said_once(workspace: Workspace) -> None:
    gone = gs_server.start()
    gone.stop()
    output = workspace.doit(
        f"remote=gs://{BUCKET}/x", "remote_write=1", MLCBUILD_REMOTE_TIMEOUT="3", **gone.environment
    )
    assert workspace.ran() == ALL
    assert said(output, "the shared cache cannot be read") == 1


@pytest.fixture
def hub() -> Iterator[WritableHub]:
    """A hub without Xet that has an empty data set repository."""
    with serving(WritableHub({}, repo="nobody/nothing")) as hub:
        assert isinstance(hub, WritableHub)
        hub.repos[CACHE], hub.commits[CACHE] = {".gitattributes": b""}, []
        yield hub


def with_hub(hub: WritableHub, **more: str) -> dict[str, Any]:
    """The environment of a user of this hub; hf_xet, which is installed, is not switched off."""
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.writer,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
    }
    return {**environment, **more}


def check_contents(hub: WritableHub) -> None:
    import hashlib

    blobs = {name: content for name, content in hub.repos[CACHE].items() if "/cas/" in name}
    assert blobs and all(name.endswith(hashlib.sha256(content).hexdigest()) for name, content in blobs.items())


@pytest.mark.slow
def test_through_a_hub(workspace: Workspace, other: Workspace, hub: WritableHub) -> None:
    output = workspace.doit(PLACE, "remote_write=1", **with_hub(hub))
    assert "shared cache" not in output, output
    assert workspace.ran() == ALL
    assert len(hub.commits[CACHE]) == GIVEN, "a commit for each step"
    check_contents(hub)
    output = other.doit("-n", "2", PLACE, **with_hub(hub))
    assert other.ran() == {}, output
    assert other.digests() == workspace.digests()
    texts = [output, *(path.read_text(errors="replace") for path in other.cache.rglob("*") if path.is_file())]
    assert not [text for text in texts if hub.writer in text]
    assert "0 put there" in mlcbuild(
        workspace, "cache", "push", "*", "--remote", PLACE.removeprefix("remote="), **with_hub(hub)
    )


@pytest.mark.slow
@pytest.mark.parametrize("xet", [False, True])
def test_large_files_go_to_a_hub_as_it_has_it(
    workspace: Workspace, other: Workspace, hub: WritableHub, tmp_path: Path, xet: bool
) -> None:
    """hf_xet is installed: huggingface_hub would send by Xet whatever hub this is."""
    hub.regular = 0
    hub.xet = tmp_path / "xet" if xet else None
    (tmp_path / "xet").mkdir()
    output = workspace.doit(PLACE, "remote_write=1", **with_hub(hub))
    assert "shared cache" not in output, output
    check_contents(hub)
    assert bool(hub.uploaded) is not xet  # by LFS; what came by Xet lies in the folder
    assert other.doit(PLACE, **with_hub(hub)).count("from the shared cache") == GIVEN
    assert other.ran() == {}


@pytest.mark.slow
def test_others_commit_at_the_same_time(workspace: Workspace, hub: WritableHub) -> None:
    hub.faults = [Fault("/commit/main", status=412, times=2)]
    output = workspace.doit(PLACE, "remote_write=1", **with_hub(hub))
    assert "shared cache" not in output, output
    assert len(hub.commits[CACHE]) == GIVEN


@pytest.mark.slow
def test_a_repository_that_is_not_there_is_said_once(workspace: Workspace, hub: WritableHub) -> None:
    output = workspace.doit("remote=hf://datasets/me/nothing", "remote_write=1", **with_hub(hub))
    assert workspace.ran() == ALL
    assert said(output, "the shared cache cannot be") == 1
    assert "datasets/me/nothing" in output and "repository" in output.lower(), output
    output = make_workspace(workspace.root.parent / "reader").doit("remote=hf://datasets/me/nothing", **with_hub(hub))
    assert said(output, "hf://datasets/me/nothing: there is nothing at all") == 1


@pytest.mark.slow
def test_a_token_that_may_not_write_is_said_once(workspace: Workspace, hub: WritableHub) -> None:
    output = workspace.doit(PLACE, "remote_write=1", **with_hub(hub, HF_TOKEN="hf_planted_of_a_reader"))
    assert workspace.ran() == ALL
    assert said(output, "the shared cache cannot be written") == 1
    assert "hf_planted_of_a_reader" not in output
