"""Whatever happens to doit, no process of a step stays behind, and the next run finds only whole things."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.workspace import Workspace, living

GRANDCHILD = "grandchild-of-toy"


def wait_until(true: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def leftovers(workspace: Workspace) -> list[int]:
    """Processes of this workspace: the steps' (their working directory is in its cache) and their grandchildren."""
    found = living(f"{GRANDCHILD}-{workspace.root}")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                folder = str((entry / "cwd").readlink())
            except OSError:
                continue
            if folder.startswith(str(workspace.root)):
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "parallel",
    [
        (),
        pytest.param(("-n", "2"), marks=pytest.mark.slow),
        pytest.param(("-n", "2", "-P", "process"), marks=pytest.mark.slow),
    ],
)
def test_a_stopped_doit_leaves_no_process(workspace: Workspace, how: signal.Signals, parallel: tuple[str, ...]) -> None:
    workspace.trick("convert.child", f"{GRANDCHILD}-{workspace.root}")
    with workspace.start(*parallel) as process:
        wait_until(lambda: living(f"{GRANDCHILD}-{workspace.root}"))
        process.send_signal(how)
        output, _ = process.communicate(timeout=60)
    wait_until(lambda: not leftovers(workspace))
    expected = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how]
    # Where doit's forked workers leave a lock closed, the kernel ends it after half a minute (doit_face/signals.py).
    assert process.returncode == expected or ("process" in parallel and process.returncode == -signal.SIGALRM), output
    if how != signal.SIGKILL:
        assert "interrupted: what is finished is kept" in output
        assert "Traceback" not in output


def test_after_a_signal_the_next_run_goes_on_from_there(workspace: Workspace) -> None:
    trick = workspace.trick("quantize.child", f"{GRANDCHILD}-{workspace.root}")
    with workspace.start() as process:
        wait_until(lambda: living(f"{GRANDCHILD}-{workspace.root}"))
        process.send_signal(signal.SIGKILL)
    trick.unlink()
    workspace.ran()
    workspace.doit()
    ran = workspace.ran()
    assert "convert" not in ran
    assert ran["quantize"] == 2


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("who", ["the step", "the process that watches it"])
def test_a_killed_step_is_an_error_that_names_the_signal(workspace: Workspace, who: str) -> None:
    workspace.trick("convert.child", f"{GRANDCHILD}-{workspace.root}")
    with workspace.start() as process:
        wait_until(lambda: living(f"{GRANDCHILD}-{workspace.root}"))
        (grandchild,) = living(f"{GRANDCHILD}-{workspace.root}")
        worker = parent(grandchild)
        os.kill(worker if who == "the step" else parent(worker), signal.SIGKILL)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "convert:tiny: killed by SIGKILL (by somebody, or by the kernel because memory ran out)" in output
    if who != "the step":  # nobody is left who knows what the step has started, though the step itself ends
        os.kill(grandchild, signal.SIGKILL)
    wait_until(lambda: not leftovers(workspace))


@pytest.mark.slow
def test_killed_at_twenty_random_moments_then_built_is_the_same_as_undisturbed(workspace: Workspace) -> None:
    workspace.doit()
    undisturbed = workspace.digests()
    seconds = _seconds(workspace)
    for seed in range(20):
        if seed % 5 == 0:
            workspace.doit("forget")
            workspace.doit("clean")
        with workspace.start("-n", "2") as process:
            time.sleep(random.Random(seed).uniform(0.05, seconds))
            process.send_signal(signal.SIGKILL)
        wait_until(lambda: not leftovers(workspace))
        assert set(workspace.digests()) <= set(undisturbed) | _staging(workspace)
    workspace.doit()
    assert workspace.digests() == undisturbed
    assert not list((workspace.cache / "tmp").iterdir())


def _staging(workspace: Workspace) -> set[str]:
    return {name for name in workspace.digests() if name.startswith(".new-")}


def _seconds(workspace: Workspace) -> float:
    """How long a build from nothing takes."""
    workspace.doit("forget")
    started = time.monotonic()
    workspace.doit("-n", "2")
    return time.monotonic() - started


@pytest.mark.slow
def test_two_builds_at_once_run_each_step_once(workspace: Workspace) -> None:
    workspace.trick("all.sleep", "0.05")
    workspace.ran()
    builds = [workspace.start("-n", "2") for _ in range(4)]
    outputs = [build.communicate(timeout=120)[0] for build in builds]
    assert [build.returncode for build in builds] == [0] * 4, outputs
    assert workspace.ran() == {
        "convert": 1,
        "quantize": 2,
        "lower": 3,
        "library": 3,
        "package": 2,
        "measure": 2,
        "verify": 2,
    }
    assert any("another process is building it; waiting" in output for output in outputs)
