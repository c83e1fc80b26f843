"""`mlcbuild build …` is `doit build …`: the same words, tasks, texts and exit statuses."""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from tests.engine.workspace import REPOSITORY, Started, Workspace


def run(workspace: Workspace, module: str, *words: str) -> tuple[int, str]:
    """The status, and the lines that are printed, in an order of their own (threads have none) and without seconds."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TOY_TRICKS": str(workspace.tricks)}
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=workspace.root, env=environment, capture_output=True, text=True, timeout=120)
    lines = (re.sub(r"\d+\.\d s", "S", done.stdout) + done.stderr).splitlines()
    return done.returncode, "\n".join(sorted(lines))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("recipe=tiny-q4f16_1-cpu",),
        ("recipe=nothing",),
        ("recipee=x",),
        ("--bogus",),
        ("model=tiny", "--log-json", "log.jsonl"),
        ("strict=1", "locked=1"),
    ],
)
def test_the_same_words_give_the_same_texts_and_status(built: Workspace, words: tuple[str, ...]) -> None:
    by_doit = run(built, "doit", "build", *words)
    assert run(built, "mlcbuild.cli", "build", *words) == by_doit
    assert by_doit[0] == (3 if {"recipe=nothing", "recipee=x", "--bogus"} & {*words} else 0)


def test_it_builds_and_fails_as_doit_does(workspace: Workspace) -> None:
    workspace.trick("quantize.fail")
    status, said = run(workspace, "mlcbuild.cli", "build")
    assert status == 1 and "quantize:tiny-q4f16_1: quantize cannot: the toy was told to fail" in said
    (workspace.tricks / "quantize.fail").unlink()
    status, said = run(workspace, "mlcbuild.cli", "build", "-a", "recipe=tiny-q4f16_1-cpu")
    assert status == 0 and "ok build:tiny-q4f16_1-cpu" in said
    assert [path.name for path in workspace.dist.iterdir()] == ["tiny-q4f16_1-cpu"]


def test_outside_of_a_workspace_it_says_what_doit_says(workspace: Workspace) -> None:
    (workspace.root / "dodo.py").unlink()
    status, said = run(workspace, "mlcbuild.cli", "build")
    assert status == 3 and "Could not find dodo file" in said


def test_the_help_lists_it(workspace: Workspace) -> None:
    assert re.search(r"^ +build +the same as `doit build`", run(workspace, "mlcbuild.cli", "--help")[1], re.MULTILINE)


@pytest.mark.slow
def test_watch_builds_again_what_an_edit_touches(workspace: Workspace) -> None:
    """Until Ctrl-C. A file with a mistake ends nothing: the next edit is seen."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TOY_TRICKS": str(workspace.tricks)}
    command = [sys.executable, "-m", "mlcbuild.cli", "watch", "recipe=tiny-q4f16_1-cpu"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    told = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # whatever the shell has told the tests
    with Started(command, cwd=workspace.root, env=environment, preexec_fn=told, **pipes) as process:
        assert process.stdout is not None

        def until_it_waits(lines: IO[str] = process.stdout) -> str:
            return "".join(itertools.takewhile(lambda line: "waiting for changes in recipes/" not in line, lines))

        assert "ok build:tiny-q4f16_1-cpu" in until_it_waits()
        path = workspace.root / "recipes" / "models" / "tiny.yaml"
        good = path.read_text()
        path.write_text(f"{good}oops: 1\n")
        said = until_it_waits()
        assert said.startswith("changed: recipes/models/tiny.yaml\n") and "oops" in said
        path.write_text(f"{good}overrides: {{context_window_size: 128}}\n")
        said = until_it_waits()
        assert "ok build:tiny-q4f16_1-cpu" in said and "-- download:tiny" in said
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    with Started(command, cwd=workspace.root, env=environment, preexec_fn=told, **pipes) as process:
        assert process.stdout is not None
        until_it_waits(process.stdout)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM


def test_what_ends_watch_ends_its_build(workspace: Workspace) -> None:
    """SIGTERM is told to one process alone, so the build and its steps must be told by that."""
    workspace.trick("quantize.child", "a child of watch's build")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TOY_TRICKS": str(workspace.tricks)}
    command = [sys.executable, "-m", "mlcbuild.cli", "watch", "recipe=tiny-q4f16_1-cpu"]

    def going() -> list[str]:
        marked = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _has(path, b"a child of watch's build")]
        return [path.parent.name for path in marked]

    with Started(command, cwd=workspace.root, env=environment, stdout=subprocess.DEVNULL) as process:
        _until(lambda: bool(going()))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        _until(lambda: not going())


def _has(path: Path, mark: bytes) -> bool:
    try:
        return mark in path.read_bytes()
    except OSError:  # it has ended
        return False


def _until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
