"""Kills at any moment of a real build, and two builds at once: nothing half-written is ever taken for whole."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.end_to_end.workspace import BIN, Workspace, make_workspace

pytestmark = pytest.mark.slow


def start(workspace: Workspace, log: Path | None = None) -> subprocess.Popen[bytes]:
    environment = workspace.environment({"MLCBUILD_LOG_JSON": str(log)} if log else {})
    return subprocess.Popen(
        [BIN / "doit", "build"],
        cwd=workspace.root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def processes_of(workspace: Workspace) -> list[int]:
    """Living processes that work in the workspace or in its cache."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                folder = str((entry / "cwd").readlink())
            except OSError:
                continue
            if folder.startswith((str(workspace.root), str(workspace.cache))):
                found.append(int(entry.name))
    return found


@pytest.fixture
def quiet(tmp_path: Path, tiny_checkpoint: Path) -> dict[str, str]:
    """What a build that nobody disturbs leaves in dist/."""
    workspace = make_workspace(tmp_path / "quiet", tmp_path / "quiet-cache", tiny_checkpoint)
    started = time.monotonic()
    workspace.doit("build")
    return {**workspace.digests("tiny-cpu"), "seconds": str(time.monotonic() - started)}


def test_twenty_sigkills_then_one_build_give_what_a_quiet_build_gives(
    tmp_path: Path, tiny_checkpoint: Path, quiet: dict[str, str]
) -> None:
    seconds = float(quiet.pop("seconds"))
    workspace = make_workspace(tmp_path / "workspace", tmp_path / "cache", tiny_checkpoint)
    moments = random.Random(0)
    for _ in range(20):
        process = start(workspace)
        time.sleep(moments.uniform(0.0, seconds / 4))  # most finish no more than a step or two
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 10
        while processes_of(workspace):
            assert time.monotonic() < deadline, "a child outlived the build"
            time.sleep(0.02)
        dist = workspace.root / "dist" / "tiny-cpu"
        if dist.exists():  # whole, or not there at all
            assert workspace.digests("tiny-cpu") == quiet
    workspace.doit("build")
    assert workspace.digests("tiny-cpu") == quiet
    assert not list((workspace.cache / "tmp").iterdir())


def test_two_builds_at_once_run_each_step_once(tmp_path: Path, tiny_checkpoint: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace", tmp_path / "cache", tiny_checkpoint)
    logs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    processes = [start(workspace, log) for log in logs]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    events = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    built = Counter(e["step"] for e in events if e["event"] == "step_finished" and e["outcome"] == "built")
    assert len(built) == 10 and set(built.values()) == {1}
    assert (workspace.root / "dist" / "tiny-cpu" / "manifest.json").exists()
