"""Many recipes at once: what runs beside what, what a failure stops, and what the exit status says."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest

from mlcbuild.doit_face.argv import keeps_going
from mlcbuild.doit_face.variables import read_variables
from mlcbuild.engine.graph import Cost, Graph, Input, Step
from mlcbuild.engine.resources import LIMITS, TAGS, Pool, budget, needs
from mlcbuild.errors import MlcBuildError
from mlcbuild.planning.backends import COSTS
from tests.engine.test_processes import leftovers, wait_until
from tests.engine.workspace import Workspace

LIBRARY = ["library"] * 3


def holds(
    pool: Pool, wanted: dict[str, int], order: list[str], name: str, release: threading.Event
) -> threading.Thread:
    def run() -> None:
        with pool.taken(wanted):
            order.append(name)
            release.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_what_does_not_fit_waits_and_is_not_overtaken_by_its_like() -> None:
    pool, order = Pool({"cores": 2, "memory": 100, "nvcc": 1}), list[str]()
    gates = {name: threading.Event() for name in ("one", "all", "late", "compiler", "other")}
    threads = [holds(pool, {"cores": 1}, order, "one", gates["one"])]
    wait_until(lambda: order == ["one"])
    threads.append(holds(pool, {"cores": 2}, order, "all", gates["all"]))  # has to wait for `one`
    wait_until(lambda: len(pool._waiting) == 1)
    threads.append(holds(pool, {"cores": 1}, order, "late", gates["late"]))  # would fit, but came later
    wait_until(lambda: len(pool._waiting) == 2)
    threads.append(holds(pool, {"nvcc": 1}, order, "compiler", gates["compiler"]))  # wants nothing that is short
    wait_until(lambda: order == ["one", "compiler"])
    threads.append(holds(pool, {"nvcc": 1}, order, "other", gates["other"]))
    wait_until(lambda: len(pool._waiting) == 3)
    gates["one"].set()
    wait_until(lambda: order == ["one", "compiler", "all"])
    gates["all"].set()
    gates["compiler"].set()
    wait_until(lambda: set(order[3:]) == {"late", "other"})
    for gate in gates.values():
        gate.set()
    for thread in threads:
        thread.join()
    with pool.taken({"cores": 64, "memory": 10**12}):  # more than there is: everything, alone
        pass


def test_a_step_takes_what_its_kind_and_its_checkpoint_say() -> None:
    steps = [
        Step("download", "download:big", "m", {}, cost=COSTS["download"], brings=14 * 10**9),
        Step("measure", "measure:big", "m", {}, (Input("package", step="download:big"),), cost=COSTS["measure"]),
        Step("measure", "measure:small", "m", {}, cost=COSTS["measure"]),
        Step("library", "library:cuda", "m", {}, cost=Cost(takes=("nvcc",))),
    ]
    graph = Graph({step.name: step for step in steps})
    assert needs(graph, "download:big", 8) == {"network": 1, "memory": 200_000_000}
    assert needs(graph, "measure:big", 8) == {"cores": 8, "memory": 12 * 10**9}
    assert needs(graph, "measure:small", 8) == {"cores": 1, "memory": 5 * 10**8}
    assert needs(graph, "library:cuda", 8)["nvcc"] == 1
    assert {*TAGS} < {*LIMITS} < set(budget().totals())


def test_the_budget_is_a_number_of_cores_and_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLCBUILD_CORES", "3")
    found = read_variables({"memory": "24G"}, tmp_path)
    assert (found.cores, found.memory) == (3, 24 * 10**9)
    assert budget(found.cores, found.memory).totals()["cores"] == 3
    with pytest.raises(MlcBuildError, match=r"cores=none: expected how many cores the steps may use together"):
        read_variables({"cores": "none"}, tmp_path)
    with pytest.raises(MlcBuildError, match=r"memory=much: 'much' is not a size"):
        read_variables({"memory": "much"}, tmp_path)
    with pytest.raises(MlcBuildError, match=r"memory=0: expected how much memory"):
        read_variables({"memory": "0"}, tmp_path)


def test_what_is_no_address(tmp_path: Path) -> None:
    """FAULTS C, a sibling: a traceback of urllib's. What may be a password is not repeated."""
    with pytest.raises(MlcBuildError, match=r"^remote=: Invalid IPv6 URL: expected an address \("):
        read_variables({"remote": "https://user:secret@["}, tmp_path)


@pytest.mark.parametrize(
    ("words", "goes_on"),
    [
        ([], True),
        (["build"], True),
        (["--no-continue", "build"], False),
        (["build", "recipe=a"], False),
        (["--continue", "build", "recipe=a"], True),
        (["recipe=a", "recipe=a,b"], True),
        (["recipe=a*"], True),
        (["build:a"], False),
        (["build:a", "build:b"], True),
        (["build:*"], True),
    ],
)
def test_one_recipe_stops_at_its_failure_and_many_go_on(words: list[str], goes_on: bool) -> None:
    assert keeps_going(words) == goes_on


def most_at_once(workspace: Workspace, *arguments: str) -> int:
    """How many steps ran side by side: processes that work in the cache, counted while they dawdle."""
    most = 0
    with workspace.start(*arguments) as process:
        while process.poll() is None:
            folders = {str(path.parent) for path in (workspace.cache / "tmp").glob("*/request.json")}
            most = max(most, len(folders))
            time.sleep(0.02)
        output, _ = process.communicate()
    assert process.returncode == 0, output
    return most


@pytest.mark.slow
def test_steps_run_side_by_side_within_the_declared_cores(workspace: Workspace) -> None:
    workspace.trick("lower.sleep", "0.1")
    assert most_at_once(workspace, "lower", "cores=1") == 1
    workspace.doit("forget")
    assert most_at_once(workspace, "lower", "cores=8", "memory=40G") == 2
    workspace.doit("forget")
    assert most_at_once(workspace, "lower", "cores=8", "memory=1500M") == 1
    workspace.doit("forget")
    assert most_at_once(workspace, "-n", "1", "lower", "cores=8", "memory=40G") == 1


def test_one_bad_recipe_stops_no_other(workspace: Workspace) -> None:
    workspace.write("recipes/models/bad.yaml", "source: {path: bad}\ntemplate: chatml\n")
    for name in ("config.json", "tokenizer.json"):
        workspace.write(f"recipes/models/bad/{name}", (workspace.root / "recipes/models/tiny" / name).read_text())
    workspace.write("recipes/models/bad/model.safetensors", "rotten weights")
    workspace.write("recipes/bad.yaml", "model: bad\nquantization: q4f16_1\ntarget: cpu\n")
    workspace.trick("convert.fail-with", "rotten")
    output = workspace.doit("build", status=1)
    assert {path.name for path in workspace.dist.iterdir()} == {"tiny-q4f16_1-cpu", "tiny-q4f32_1-cpu"}
    assert output.splitlines()[-1] == "1 of 3 recipes failed: bad"
    assert "build:bad: not built, because of convert:bad" in output
    output = workspace.doit("build", "recipe=bad", status=1)
    assert "build:bad: not built" not in output  # nothing else was tried


@pytest.mark.slow
def test_a_model_that_cannot_be_planned_stops_no_other(workspace: Workspace) -> None:
    workspace.write("recipes/models/bad.yaml", "source: {path: bad}\ntemplate: chatml\n")
    workspace.write("recipes/models/bad/config.json", "not JSON")
    workspace.write("recipes/bad.yaml", "model: bad\nquantization: q4f16_1\ntarget: cpu\n")
    output = workspace.doit("build", "log_json=log.jsonl", f"summary={workspace.root}/summary.md", status=1)
    assert {path.name for path in workspace.dist.iterdir()} == {"tiny-q4f16_1-cpu", "tiny-q4f32_1-cpu"}
    assert "config.json: cannot be read as JSON" in output
    assert output.splitlines()[-1] == "1 of 3 recipes failed: bad"
    summary = (workspace.root / "summary.md").read_text()
    assert "1 failed, 2 built" in summary and "cannot be read as JSON" in summary
    assert "cannot be read as JSON" in workspace.doit("build", "recipe=bad", status=3)
    assert "cannot be read as JSON" in workspace.doit("--no-continue", "build", status=3)


def test_a_bug_keeps_doits_own_status(workspace: Workspace) -> None:
    workspace.trick("quantize.crash")
    workspace.doit("build", status=2)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_stops_everything_that_runs_and_keeps_what_is_done(workspace: Workspace, how: signal.Signals) -> None:
    workspace.trick("library.sleep", "30")
    with workspace.start("cores=8", "memory=40G") as process:
        log = workspace.tricks / "ran.txt"
        wait_until(lambda: log.exists() and log.read_text().split().count("library") == len(LIBRARY))
        process.send_signal(how)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[how], output
    wait_until(lambda: not leftovers(workspace))
    (workspace.tricks / "library.sleep").unlink()
    ran = workspace.ran()
    workspace.doit()
    again = workspace.ran()
    assert again["library"] == len(LIBRARY)
    assert "lower" not in again and ran["lower"] == len(LIBRARY)
    assert not list((workspace.cache / "tmp").iterdir())
