"""Steps on a Dask cluster: a scheduler and its workers as processes on loopback, a folder as the shared cache."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mlcbuild.doit_face.argv import on_cluster
from tests.doit_face.test_doit import ALL
from tests.engine.test_processes import leftovers, wait_until
from tests.engine.workspace import REPOSITORY, Workspace, make_workspace


@dataclass
class Dask:
    """A scheduler with workers, each a process with a folder of its own."""

    folder: Path
    tricks: Path
    address: str = ""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{name}.log").open("wb")
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_" + arguments[0], *arguments[1:]],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TOY_TRICKS": str(self.tricks), **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        return self.processes[name]

    def scheduler(self) -> None:
        self.start("scheduler", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        log = self.folder / "scheduler.log"
        wait_until(lambda: re.search(rb"Scheduler at:\s+(tcp://[\d.:]+)", log.read_bytes()), 60)
        found = re.search(r"Scheduler at:\s+(tcp://[\d.:]+)", log.read_text())
        assert found is not None
        self.address = found[1]

    def worker(self, name: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        folder = self.folder / name
        options = ["--no-nanny", "--no-dashboard", "--nthreads", "1", "--local-directory", str(folder)]
        return self.start(name, "worker", self.address, "--name", name, *options, *arguments, **environment)

    def ready(self, name: str) -> None:
        log = self.folder / f"{name}.log"
        wait_until(lambda: b"Registered to" in log.read_bytes(), 60)

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            process.kill()
            process.wait()


@pytest.fixture
def dask(workspace: Workspace, tmp_path: Path) -> Iterator[Dask]:
    pytest.importorskip("distributed")
    folder = tmp_path / "dask"
    folder.mkdir()
    cluster = Dask(folder, workspace.tricks)
    try:
        cluster.scheduler()
        yield cluster
    finally:
        cluster.stop()


def words(dask: Dask, tmp_path: Path) -> list[str]:
    return [f"scheduler={dask.address}", f"remote={tmp_path}/shared", "remote_write=1"]


@pytest.mark.slow
def test_unique_steps_run_on_workers_and_the_result_is_the_same(
    workspace: Workspace, dask: Dask, tmp_path: Path
) -> None:
    quiet = make_workspace(tmp_path / "quiet")
    quiet.doit()
    for name in ("one", "two"):
        dask.worker(name)
    workspace.trick("all.sleep", "0.02")
    workspace.doit(*words(dask, tmp_path))
    assert workspace.ran() == ALL  # each once; the toys tell wherever they run
    assert workspace.digests() == quiet.digests()
    made = [len(list(cache.glob("ac/*/*.json"))) for cache in dask.folder.rglob("mlcbuild-cache")]
    assert len(made) == 2 and sum(made) == sum(ALL.values()) and all(made), made
    workspace.doit(*words(dask, tmp_path))
    assert workspace.ran() == {}


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_a_step(workspace: Workspace, dask: Dask, tmp_path: Path) -> None:
    quiet = make_workspace(tmp_path / "quiet")
    quiet.doit()
    victim = dask.worker("one")
    dask.ready("one")
    workspace.trick("quantize.sleep", "1")
    with workspace.start(*words(dask, tmp_path)) as process:
        log = workspace.tricks / "ran.txt"
        wait_until(lambda: log.exists() and "quantize" in log.read_text(), 60)
        victim.send_signal(signal.SIGKILL)
        dask.worker("two")
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert workspace.ran()["quantize"] >= 3  # two, and the one that was cut off
    assert workspace.digests() == quiet.digests()
    wait_until(lambda: not leftovers(workspace))


@pytest.mark.slow
def test_a_scheduler_lost_in_the_middle_of_a_step(workspace: Workspace, dask: Dask, tmp_path: Path) -> None:
    """FAULTS.md C: the right sentence, and then a traceback of asyncio's."""
    dask.worker("one")
    dask.ready("one")
    workspace.trick("quantize.sleep", "30")
    with workspace.start(*words(dask, tmp_path)) as process:
        log = workspace.tricks / "ran.txt"
        wait_until(lambda: log.exists() and "quantize" in log.read_text(), 60)
        dask.stop()
        output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "the cluster was lost: " in output and "Traceback" not in output and "bug" not in output, output


@pytest.mark.slow
def test_a_signal_ends_the_build_here_and_what_a_worker_makes_is_kept(
    workspace: Workspace, dask: Dask, tmp_path: Path
) -> None:
    dask.worker("one")
    dask.ready("one")
    workspace.trick("quantize.sleep", "0.5")
    with workspace.start(*words(dask, tmp_path)) as process:
        log = workspace.tricks / "ran.txt"
        wait_until(lambda: log.exists() and "quantize" in log.read_text(), 60)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=25)
    assert process.returncode == 143, output
    assert "interrupted: what is finished is kept" in output and "Traceback" not in output
    wait_until(lambda: list((tmp_path / "shared/ac").glob("*/*.json")) and not leftovers(workspace))
    (workspace.tricks / "quantize.sleep").unlink()
    workspace.ran()
    workspace.doit(*words(dask, tmp_path))
    assert "convert" not in workspace.ran()


@pytest.mark.slow
def test_what_no_worker_has_is_said_before_anything_starts(workspace: Workspace, dask: Dask, tmp_path: Path) -> None:
    dask.worker("one", "--resources", "memory=300e6")
    dask.ready("one")
    output = workspace.doit(*words(dask, tmp_path), status=3)
    assert "no worker of the cluster has what these steps need, so nothing was started: " in output
    assert "lower:" in output and "1.0 GB of memory" in output
    assert workspace.ran() == {}
    dask.worker("two", "--resources", "memory=8e9")
    dask.ready("two")
    workspace.trick("quantize.fail")
    output = workspace.doit(*words(dask, tmp_path), status=1)
    assert "quantize:tiny-q4f16_1: quantize cannot: the toy was told to fail; take quantize.fail away" in output
    (workspace.tricks / "quantize.fail").unlink()
    workspace.doit(*words(dask, tmp_path))  # a failure is not remembered
    assert len(workspace.digests()) > 0


def test_a_scheduler_that_is_not_there_and_a_cache_that_is_not_shared(workspace: Workspace, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    output = workspace.doit("scheduler=tcp://127.0.0.1:9", status=3)
    assert "workers and this machine exchange files through the shared cache, so it needs remote=URL" in output
    assert on_cluster(["build", "scheduler=tcp://127.0.0.1:9"]) and not on_cluster(["build"])
    started = time.monotonic()
    output = workspace.doit(
        "scheduler=tcp://127.0.0.1:9",
        f"remote={tmp_path}/shared",
        "remote_write=1",
        status=3,
        MLCBUILD_SCHEDULER_TIMEOUT="1",
    )
    assert "scheduler=tcp://127.0.0.1:9: no Dask scheduler answers there" in output
    assert time.monotonic() - started < 20
