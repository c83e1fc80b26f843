"""A fault drill: one build of two recipes, from a hub to a hub, on the worst of days.

The disk is too small, the hub cuts downloads off, step processes are killed, the shared cache dies in the middle, blobs
rot here and there, the hub refuses the commit. After the faults one more run has to reach what a quiet build reaches,
and at no time is anything on the hub that a quiet build would not have put there. The tokens that all this needs are in
the environment throughout, and must be nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.hub_server import Fault, serving
from tests.checkpoints.hub_writes import WritableHub
from tests.end_to_end.workspace import BIN, Workspace, digests, make_workspace
from tests.engine import s3_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(s3_server.program() is None, reason="no juicefs beside this interpreter"),
]
SOURCE = "owner/tiny"
GENTLE = "verify: {kl: 90, perplexity_increase: 90, perplexity: 9000}\n"  # random weights pass no gate


class Day:
    """One workspace with its cache, the shared cache and the hub, and everything that was printed."""

    def __init__(self, folder: Path, checkpoint: Path, hub: WritableHub, cache: Path | None = None) -> None:
        self.hub = hub
        self.folder = folder
        self.workspace = make_workspace(folder / "workspace", cache or folder / "cache", checkpoint)
        (self.workspace.root / "recipes/tiny-cpu.yaml").unlink()
        self.workspace.write("recipes/models/tiny.yaml", f"source: {{hf: {SOURCE}}}\ntemplate: chatml\n{GENTLE}")
        self.workspace.recipe("tiny-4bit", target="cpu-x86_64")
        self.workspace.recipe("tiny-full", quantization="q0f32")
        self.environment = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.writer,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(folder / "hf"),
            "MLCBUILD_NAMESPACE": "me",
            "MLCBUILD_LOG_JSON": str(folder / "log.jsonl"),
            "MLCBUILD_REPORT": str(folder / "report.html"),
            "MLCBUILD_SUMMARY": str(folder / "summary.md"),
            "MLCBUILD_REMOTE_TIMEOUT": "12",
        }
        self.said = ""

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(BIN / "doit"), "publish", "upload=1"],
            cwd=self.workspace.root,
            env=self.workspace.environment(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self) -> int:
        """Build and publish everything; the exit status."""
        done = self.workspace.doit("publish", "upload=1", check=False, environment=self.environment)
        self.said += done.stdout + done.stderr
        return done.returncode

    def packages(self) -> dict[str, str]:
        """The content of dist/, without the hub's own address."""
        found = digests(self.workspace.root / "dist")
        return {name: digest for name, digest in found.items() if not name.endswith("published.json")}

    def repositories(self) -> dict[str, Mapping[str, bytes]]:
        """What is on the hub; its own address, which differs from day to day, is left out."""
        own = self.hub.url.encode()
        return {
            repo: {name: content.replace(own, b"HUB") for name, content in files.items()}
            for repo, files in self.hub.repos.items()
        }


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A disk of its own in `folder`, if this machine lets us have one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def checkpoint_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def harass(day: Day, server: s3_server.Server) -> int:
    """The exit status of a run whose first steps are killed, and then the shared cache."""
    process = day.start()
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.append(process.communicate()[0]))
    reader.start()
    while process.poll() is None and not step_processes(day.workspace):
        time.sleep(0.02)
    for step in step_processes(day.workspace):
        with contextlib.suppress(ProcessLookupError):
            os.kill(step, signal.SIGKILL)
    server.process.kill()
    reader.join()
    day.said += output[0]
    return process.returncode


def step_processes(workspace: Workspace) -> list[int]:
    """Processes that work in the cache: the steps themselves, and what they started."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and str((entry / "cwd").readlink()).startswith(str(workspace.cache / "tmp")):
                found.append(int(entry.name))
    return sorted(found)


def spoil(path: Path) -> None:
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_after_the_worst_of_days_one_run_reaches_what_a_quiet_one_does(tmp_path: Path, tiny_checkpoint: Path) -> None:
    files = checkpoint_of(tiny_checkpoint)
    with serving(WritableHub(dict(files), repo=SOURCE)) as hub:
        assert isinstance(hub, WritableHub)
        quiet = Day(tmp_path / "quiet", tiny_checkpoint, hub)
        assert quiet.run() == 0, quiet.said
        wanted, published = quiet.packages(), quiet.repositories()
        hub_files = {name for repo in published.values() for name in repo}
        assert "params_shard_0.bin" in hub_files and "README.md" in hub_files

    server = s3_server.start(make_folder(tmp_path / "s3"))
    with serving(WritableHub(dict(files), repo=SOURCE)) as hub, small_disk(tmp_path / "disk", "400k") as small:
        assert isinstance(hub, WritableHub)
        day = Day(tmp_path / "day", tiny_checkpoint, hub, tmp_path / "disk" / "cache")
        day.environment |= {"MLCBUILD_REMOTE": "s3://test/nightly", "MLCBUILD_REMOTE_WRITE": "1", **server.environment}
        make_bucket(server)

        def nothing_wrong_is_out() -> None:
            """Whatever is on the hub is what a quiet build puts there."""
            for repo, content in day.repositories().items():
                for name, data in content.items():
                    assert name in published[repo] and data == published[repo][name], (repo, name)

        hub.faults = [Fault("model.safetensors", cut=1000, times=3), Fault("model.safetensors", status=404, times=9)]
        assert day.run() in (1, 3), day.said  # the hub
        hub.faults = []
        nothing_wrong_is_out()
        if small:
            assert day.run() in (1, 3), day.said
            assert "disk" in day.said
            subprocess.run(["mount", "-o", "remount,size=400m", str(tmp_path / "disk")], check=True)
            nothing_wrong_is_out()

        assert harass(day, server) == 2, day.said
        server.stop()
        nothing_wrong_is_out()

        server = s3_server.start_again(server)
        day.environment |= server.environment
        hub.faults = [Fault("/commit/main", status=500, times=999)]
        assert day.run() == 1, day.said  # everything is built; the hub takes no commit
        assert hub.blobs and "run it again: what has arrived is not sent again" in day.said
        nothing_wrong_is_out()
        hub.faults = []

        for blob in sorted((day.workspace.cache / "cas").glob("*/*")):
            if blob.suffix != ".at":
                spoil(blob)
        spoil_bucket(server)
        shutil.rmtree(day.workspace.root / "dist")
        day.workspace.run("mlcbuild", "cache", "verify", check=False, environment=day.environment)
        assert day.run() == 0, day.said
        nothing_wrong_is_out()
        assert day.packages() == wanted
        assert day.repositories() == published
        server.stop()

        secrets = [hub.writer, s3_server.SECRET, s3_server.KEY]
        places = [day.workspace.root, day.workspace.cache, day.folder]
        texts = {str(path): path.read_bytes() for place in places for path in place.rglob("*") if path.is_file()}
        texts |= {f"{repo}/{name}": data for repo, content in day.hub.repos.items() for name, data in content.items()}
        texts["what was printed"] = day.said.encode()
        assert {"log.jsonl", "report.html", "summary.md"} <= {Path(name).name for name in texts}
        leaks = [(name, secret) for name, text in texts.items() for secret in secrets if secret.encode() in text]
        assert leaks == []


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def file_system(server: s3_server.Server) -> Any:
    import s3fs

    return s3fs.S3FileSystem(
        key=s3_server.KEY,
        secret=s3_server.SECRET,
        endpoint_url=server.endpoint,
        client_kwargs={"region_name": "us-east-1"},
        skip_instance_cache=True,
    )


def make_bucket(server: s3_server.Server) -> None:
    file_system(server).mkdir("test")


def spoil_bucket(server: s3_server.Server) -> None:
    """Put other bytes of the same number in the place of every blob."""
    bucket = file_system(server)
    names = bucket.find("test/nightly/cas")
    assert names
    for name in names:
        bucket.pipe_file(name, b"?" * bucket.size(name))
