"""Threads: as many as asked, bound to nothing, and the caller left where it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import threads


def run(code: str, **environment: str) -> str:
    """The output of a fresh interpreter: a process has one thread pool for its lifetime."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("TVM_", "OMP_"))}
    return subprocess.run(
        [sys.executable, "-c", "import os\nfrom mlcbuild.runtime import threads\n" + code],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_the_default_is_every_core_that_may_be_used() -> None:
    """TVM's own default is half of the logical CPUs, whatever the process may use."""
    assert run("os.sched_setaffinity(0, {0}); print(threads.choose())") == "1"
    assert int(run("print(threads.choose())")) <= len(os.sched_getaffinity(0))


def test_hardware_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four logical CPUs on two cores of one package."""
    for cpu, core in enumerate([0, 1, 0, 1]):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "core_id").write_text(f"{core}\n")
        (topology / "physical_package_id").write_text("0\n")
    monkeypatch.setattr(threads, "_CPUS", tmp_path)
    assert threads.physical_cores(range(4)) == 2
    assert threads.physical_cores([1, 3]) == 1
    assert threads.physical_cores([7]) == 1  # nothing known of it


def test_a_container_with_a_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    monkeypatch.setattr("mlcbuild.host.processors", lambda: list(range(10_000, 10_064)))
    monkeypatch.setattr(threads, "_CGROUP1", tmp_path / "none")
    for text, expected in (("250000 100000", 2), ("50000 100000", 1), ("max 100000", 64)):
        (tmp_path / "cpu.max").write_text(text)
        monkeypatch.setattr(threads, "_CGROUP2", tmp_path / "cpu.max")
        assert threads.choose() == expected


def test_the_argument_wins_over_the_environment() -> None:
    assert run("print(threads.choose(), threads.choose(3))", TVM_NUM_THREADS="5") == "5 3"
    with pytest.raises(MlcBuildError, match="threads is 0: expected a whole number of at least 1"):
        threads.choose(0)


def test_a_nonsensical_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "many")
    with pytest.raises(MlcBuildError, match="TVM_NUM_THREADS is many: expected"):
        threads.choose()


@pytest.mark.slow
def test_the_pool_has_that_many_and_nobody_is_bound() -> None:
    """Left alone, TVM moves even the caller to core 0, outside its affinity mask."""
    code = """
cpu = max(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cpu})
before = set(os.listdir("/proc/self/task"))
count = threads.configure(3)
new = [int(task) for task in set(os.listdir("/proc/self/task")) - before]
print(count, all(os.sched_getaffinity(task) == {cpu} for task in [0, *new]), "TVM_BIND_THREADS" in os.environ)
"""
    assert run(code) == "3 True False"


@pytest.mark.slow
def test_a_pool_can_shrink_but_not_grow() -> None:
    assert run("print(threads.configure(3), threads.configure(2), threads.configure(6))") == "3 2 3"
