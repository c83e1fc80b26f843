"""The shared cache: a folder that several machines have, with everything that goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.cache.remote import Remote, shown
from mlcbuild.doit_face import variables
from mlcbuild.errors import MlcBuildError
from tests.doit_face.test_doit import ALL, REPORT_IMPORTS
from tests.engine.s3_server import KEY, SECRET
from tests.engine.workspace import Workspace, make_workspace
from tests.workspace.test_maintenance import mlcbuild

HERE = {"download"}  # steps that only refer to this machine's files


@pytest.fixture
def other(tmp_path: Path) -> Workspace:
    """The same recipes and checkpoint on another machine."""
    return make_workspace(tmp_path / "other")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shared"


@pytest.fixture(scope="module")
def filled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    workspace = make_workspace(folder)
    workspace.doit(f"remote={folder / 'shared'}", "remote_write=1")
    assert workspace.ran() == ALL
    return folder


@pytest.fixture
def filled(filled_once: Path, tmp_path: Path) -> Workspace:
    """A trusted builder that has built everything; what it gave is in `folder`."""
    shutil.copytree(filled_once, tmp_path, dirs_exist_ok=True)
    return Workspace(tmp_path / "workspace", tmp_path / "tricks")


def blobs(folder: Path) -> list[Path]:
    return sorted(folder.glob("cas/*/*"))


def said(output: str, text: str) -> int:
    return sum(text in line for line in output.splitlines())


def test_what_one_machine_built_the_other_fetches(filled: Workspace, other: Workspace, folder: Path) -> None:
    output = other.doit(f"remote={folder}")
    assert other.ran() == {}
    assert said(output, "from the shared cache") == sum(ALL.values())
    assert other.digests() == filled.digests()
    assert not list(folder.rglob("*.part"))
    figures = mlcbuild(other, "cache", "stats")
    (verify,) = [line.split() for line in figures.splitlines() if line.startswith("verify")]
    assert verify[4:6] == ["0", "2"]  # built, fetched


@pytest.mark.slow
def test_only_a_trusted_builder_writes(workspace: Workspace, folder: Path) -> None:
    folder.mkdir()
    workspace.doit(f"remote={folder}")
    assert not list(folder.iterdir())
    workspace.doit("-a", f"remote={folder}", MLCBUILD_REMOTE_WRITE="1")
    assert blobs(folder)


def test_local_checkpoints_are_not_uploaded(filled: Workspace, folder: Path) -> None:
    weights = (filled.root / "recipes/models/tiny/model.safetensors").read_bytes()
    assert weights not in [path.read_bytes() for path in blobs(folder)]
    kinds = {json.loads(path.read_text())["step"] for path in folder.glob("ac/*/*.json")}
    assert kinds == {*ALL} - HERE


@pytest.mark.slow
def test_what_is_here_is_not_asked_for(filled: Workspace, folder: Path) -> None:
    """Nor does a build without a shared cache, or with everything here, import what talks to one."""
    filled.write("dodo.py", (filled.root / "dodo.py").read_text() + "import atexit, sys\n" + REPORT_IMPORTS)
    shutil.rmtree(folder)
    for arguments in (["build:tiny-q4f16_1-cpu"], ["-n", "1"]):
        output = filled.doit(*arguments, f"remote={folder}")
        assert "shared cache" not in output
        assert "fsspec" not in output.split("IMPORTED ")[1].split()
    assert not folder.exists()
    filled.doit("-a", "quantize")
    assert "fsspec" not in filled.doit("-a", "quantize").split("IMPORTED ")[1].split()


@pytest.mark.parametrize(
    "damage",
    ["other bytes", pytest.param("truncated", marks=pytest.mark.slow), pytest.param("missing", marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_a_damaged_blob_is_never_taken_and_is_mended(
    filled: Workspace, other: Workspace, folder: Path, damage: str
) -> None:
    for path in blobs(folder):
        content = path.read_bytes()
        path.unlink()
        if damage != "missing":
            path.write_bytes(content[:-1] if damage == "truncated" else bytes([content[0] ^ 1]) + content[1:])
    output = other.doit(f"remote={folder}", "remote_write=1")
    assert other.ran() == ALL
    assert "what it has of this is damaged (blob " in output
    assert other.digests() == filled.digests()
    third = make_workspace(other.root.parent / "third")
    output = third.doit(f"remote={folder}")
    assert third.ran() == {}, output


@pytest.mark.parametrize(
    "text", [pytest.param(text, marks=pytest.mark.slow) for text in ("", "{", "[]", '{"files": {}}')] + ["another"]
)
def test_a_damaged_entry_is_never_taken(filled: Workspace, other: Workspace, folder: Path, text: str) -> None:
    entries = sorted(folder.glob("ac/*/*.json"))
    contents = [path.read_text() for path in entries]
    for path, content in zip(entries, [*contents[1:], contents[0]], strict=True):
        path.write_text(content if text == "another" else text)
    output = other.doit(f"remote={folder}")
    assert other.ran() == ALL
    assert "damaged (its entry " in output
    assert other.digests() == filled.digests()


@pytest.mark.slow
def test_an_entry_cannot_write_elsewhere(filled: Workspace, other: Workspace, folder: Path) -> None:
    from mlcbuild.cache.tree import digest_json

    for path in folder.glob("ac/*/*.json"):
        record = json.loads(path.read_text())
        record["files"] = {"a": ["../../../outside", 1, 0o644]}
        record["tree"] = digest_json(record["files"])
        path.write_text(json.dumps(record))
    assert "that cannot be" in other.doit(f"remote={folder}")
    assert other.ran() == ALL


@pytest.mark.slow
def test_uploads_go_on_where_they_stopped(filled: Workspace, folder: Path) -> None:
    """Entries and one blob are lost: what is still there is not written again."""
    shutil.rmtree(folder / "ac")
    first, *rest = blobs(folder)
    first.unlink()
    before = {path: path.stat().st_mtime_ns for path in rest}
    text = mlcbuild(filled, "cache", "push", "*", "--remote", str(folder))
    assert text == f"{sum(ALL.values())} put there, 1 were there already\n".replace("1 were", "0 were")
    assert first.exists()
    assert {path: path.stat().st_mtime_ns for path in rest} == before
    text = mlcbuild(filled, "cache", "push", "*", "--remote", str(folder))
    assert text == f"0 put there, {sum(ALL.values())} were there already\n"


@pytest.mark.slow
def test_a_remote_that_is_down_is_said_once(workspace: Workspace) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        environment: dict[str, Any] = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }
        output = workspace.doit(
            "remote=s3://bucket/cache", "remote_write=1", MLCBUILD_REMOTE_TIMEOUT="3", **environment
        )
    assert workspace.ran() == ALL
    assert said(output, "the shared cache cannot be") == 1
    assert "The build goes on without it; the rest is built here" in output
    assert SECRET not in output


@pytest.mark.slow
def test_a_remote_that_never_answers_is_given_up(workspace: Workspace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment: dict[str, Any] = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }
        started = time.monotonic()
        output = workspace.doit("remote=s3://bucket/cache", MLCBUILD_REMOTE_TIMEOUT="0.5", **environment)
    assert workspace.ran() == ALL
    assert said(output, "no answer within 0.5 s, or less than 500 kB a second") == 1
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_said_once(workspace: Workspace, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    output = workspace.doit(f"remote={file}", "remote_write=1")
    assert workspace.ran() == ALL
    assert said(output, "the shared cache cannot be") == 1


@pytest.mark.slow
def test_a_place_with_nothing_is_said_once(workspace: Workspace, folder: Path) -> None:
    """By readers: who writes may be the first."""
    assert said(workspace.doit(f"remote={folder}"), f"{folder}: there is nothing at all; is this the") == 1
    assert workspace.ran() == ALL
    assert not folder.exists()
    assert "nothing at all" not in workspace.doit("-a", f"remote={folder}", "remote_write=1")
    workspace.write("recipes/more.yaml", "model: tiny\nquantization: q8f16_1\ntarget: cpu\n")
    assert "nothing at all" not in workspace.doit(f"remote={folder}")


@pytest.mark.slow
def test_a_missing_driver_is_said_once(workspace: Workspace) -> None:
    output = workspace.doit("remote=nosuch://bucket", "remote_write=1")
    assert workspace.ran() == ALL
    assert said(output, "nosuch://bucket: the shared cache cannot be read") == 1


@pytest.mark.slow
def test_a_full_remote_is_said_once_and_can_be_read(workspace: Workspace, other: Workspace, small: Path) -> None:
    output = workspace.doit(MLCBUILD_REMOTE=str(small), MLCBUILD_REMOTE_WRITE="1")
    assert workspace.ran() == ALL
    assert said(output, "the shared cache cannot be written: [Errno 28] No space left on device") == 1
    assert said(output, "The build goes on without it; the rest is kept here only") == 1
    for path in blobs(small):
        assert path.name == hashlib.sha256(path.read_bytes()).hexdigest()
    output = other.doit(f"remote={small}")
    assert 0 < said(output, "from the shared cache") < sum(ALL.values())
    assert "damaged" not in output
    assert other.digests() == workspace.digests()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A shared folder with room for a few files."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        if os.environ.get("MLCBUILD_TEST_NO_SKIPS"):
            pytest.fail("a small tmpfs cannot be mounted")
        pytest.skip("a small tmpfs cannot be mounted")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_two_builders_at_once(workspace: Workspace, other: Workspace, folder: Path) -> None:
    arguments = (f"remote={folder}", "remote_write=1", "-n", "2")
    with workspace.start(*arguments) as one, other.start(*arguments) as two:
        texts = [process.communicate(timeout=120)[0] for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), texts
    assert not [text for text in texts if "damaged" in text or "cannot be" in text]
    assert workspace.digests() == other.digests()
    third = make_workspace(other.root.parent / "third")
    third.doit(f"remote={folder}")
    assert third.ran() == {}


@pytest.mark.slow
def test_a_killed_upload_leaves_nothing_half(workspace: Workspace, folder: Path) -> None:
    with workspace.start(f"remote={folder}", "remote_write=1") as process:
        while not blobs(folder):
            time.sleep(0.001)
        process.kill()
        process.communicate()
    for path in blobs(folder):
        assert path.suffix == ".part" or path.name == hashlib.sha256(path.read_bytes()).hexdigest()
    workspace.doit(f"remote={folder}", "remote_write=1")
    mlcbuild(workspace, "cache", "push", "*", "--remote", str(folder))
    third = make_workspace(workspace.root.parent / "third")
    third.doit(f"remote={folder}")
    assert third.ran() == {}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["remote_write=yes", "remote=x"], "remote_write=yes: expected remote_write=1 or remote_write=0"),
        (["remot=x"], "unknown variable remot=: did you mean remote=?"),
    ],
)
def test_mistakes(workspace: Workspace, arguments: list[str], text: str) -> None:
    assert text in workspace.doit(*arguments, status=3)


def test_a_bad_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLCBUILD_REMOTE_TIMEOUT", "soon")
    with pytest.raises(MlcBuildError, match="MLCBUILD_REMOTE_TIMEOUT=soon: expected a number of seconds"):
        variables.read_patience()


def test_push_needs_to_know_where(shared: Workspace) -> None:
    assert "which shared cache? Give --remote URL" in mlcbuild(shared, "cache", "push", "*", status=1)


def test_nothing_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    remote = Remote("s3://user:password1@bucket/cache?token=abcd", 1)
    assert remote.shown == shown("s3://user:password1@bucket/cache?token=abcd") == "s3://bucket/cache"
    error = OSError(
        "s3://user:password1@bucket/cache?token=abcd: hf_planted, password1 at https://x.y/z?X-Amz-Key=1 no"
    )
    assert remote.words(error) == "s3://bucket/cache: [hidden], [hidden] at https://x.y/z?… no"
