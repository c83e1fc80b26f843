"""What a person sees on a terminal: one display while steps run, and after the end only lines."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mlcbuild.reporting import events
from mlcbuild.reporting.screen import screen
from tests.engine.workspace import REPOSITORY, Workspace, make_workspace
from tests.support.terminal import Screen, on_terminal

BAR = "━"


def build(workspace: Workspace, *words: str) -> tuple[int, str, Screen]:
    environment = {"PYTHONPATH": str(REPOSITORY), "TOY_TRICKS": str(workspace.tricks)}
    return on_terminal([sys.executable, "-m", "doit", *words], workspace.root, environment)


def check_end(after: Screen) -> None:
    """The display is gone, the cursor is back, and the shell's prompt has a line of its own."""
    assert not [line for line in after.lines if BAR in line or "from the cache" in line], after.lines
    assert after.cursor and after.column == 0 and after.lines[-1] == ""


@pytest.mark.slow
def test_a_build_on_a_terminal_has_one_display_that_counts_right_and_goes(workspace: Workspace) -> None:
    """FAULTS G: two steps that began in the same instant had a display each."""
    status, written, after = build(workspace)
    assert status == 0, written
    check_end(after)
    assert after.hidden == 1
    assert BAR in written and "16 built, 0 from the cache" in written
    *lines, last, _ = after.lines
    assert last.startswith("18 done, 0 up to date; ")
    assert all(line.startswith("ok ") for line in lines[:18]), lines
    assert lines[18].startswith("package ") and all(line.startswith("dist/tiny-q4") for line in lines[19:]), lines
    assert len(lines) == 21


def test_what_was_found_before_the_first_step_ran_is_counted(built: Workspace) -> None:
    built.doit("forget", "verify:tiny-q4f16_1-cpu")
    status, written, after = build(built)
    assert status == 0, written
    check_end(after)
    assert after.hidden == 1
    assert "1 built, 16 from the cache" in written  # 15 steps and a package


@pytest.mark.parametrize("words", [("-a", "--no-continue"), ("-a", "--continue")])
@pytest.mark.slow
def test_a_build_that_fails_leaves_no_bars(workspace: Workspace, words: tuple[str, ...]) -> None:
    workspace.trick("quantize.fail")
    workspace.trick("lower.sleep", "1")  # some steps run still when another fails
    status, written, after = build(workspace, *words)
    assert status == 1, written
    check_end(after)
    assert "quantize:tiny-q4f16_1: quantize cannot: the toy was told to fail" in "\n".join(after.lines)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("doit", "info", "build:tiny-q4f16_1-cpu"), -signal.SIGPIPE),
        (("doit", "list", "--all"), -signal.SIGPIPE),
        (("doit", "build"), 0),
        (("doit", "-a", "quantize"), 0),
        (("doit", "-a", "quantize", "recipe=nothing"), 3),
        (("mlcbuild.cli", "plan"), 1),
    ],
)
def test_a_reader_that_goes_is_no_error(shared: Workspace, words: tuple[str, ...], status: int) -> None:
    """FAULTS C: `doit info … | head`: nothing is said of it, and a build goes on."""
    reader, end = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TOY_TRICKS": str(shared.tricks)}
    command = [sys.executable, "-m", *words]
    with os.fdopen(end, "w") as output:
        done = subprocess.run(
            command, cwd=shared.root, env=environment, stdout=output, stderr=subprocess.PIPE, timeout=60
        )
    assert done.returncode == status, done.stderr.decode()
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr
    assert shared.ran() == ({"convert": 1, "quantize": 2} if words == ("doit", "-a", "quantize") else {})


@pytest.mark.parametrize(
    ("words", "how", "status", "said"),
    [
        ("doit build", ">&- <&-", 0, ""),
        ("doit -a quantize", ">&- 2>&- <&-", 0, ""),
        ("mlcbuild.cli plan", ">&-", 0, ""),
        ("mlcbuild.cli check", ">/dev/full", 1, "the output cannot be written: No space left on device"),
    ],
)
def test_streams_that_are_closed_or_full(shared: Workspace, words: str, how: str, status: int, said: str) -> None:
    """FAULTS C, siblings of `| head`: under cron and the like a build ended in a traceback, and of a full disk behind
    the output it was said that the workspace's is full."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TOY_TRICKS": str(shared.tricks)}
    command = ["sh", "-c", f'exec "$0" -m {words} {how}', sys.executable]
    done = subprocess.run(command, cwd=shared.root, env=environment, capture_output=True, text=True, timeout=60)
    text = done.stderr.strip().removeprefix("mlcbuild check: ")
    assert (done.returncode, done.stdout, text) == (status, "", said)


def test_a_character_that_the_terminal_lacks(tmp_path: Path) -> None:
    """FAULTS C, a sibling: it was told to save its files as UTF-8."""
    workspace = make_workspace(tmp_path)
    workspace.write("recipes/\u00e9.yaml", "model: tiny\n")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii"}
    for words in (["mlcbuild.cli", "check"], ["doit", "list"]):
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=workspace.root, env=environment, capture_output=True, text=True, timeout=60)
        assert "recipes/\\xe9.yaml:1:1: rename the file: " in done.stdout + done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def seen(self) -> Screen:
        after = Screen()
        after.feed(self.getvalue().replace("\n", "\r\n"))
        return after


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def test_steps_that_start_in_the_same_instant_share_a_display(terminal: Terminal) -> None:
    report, together = screen(terminal), threading.Barrier(16)

    def start(number: int) -> None:
        together.wait()
        report(events.StepStarted(f"lower:{number}", "lower"))

    threads = [threading.Thread(target=start, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report(events.RunFinished(1.0, 0, 0, 0, 0))
    assert terminal.seen().hidden == 1


def test_a_step_that_reports_after_the_end_brings_no_display_back(terminal: Terminal) -> None:
    """A build that is broken off has steps that have not heard of it yet."""
    report = screen(terminal)
    report(events.StepStarted("lower:x", "lower"))
    report(events.RunFinished(1.0, 0, 0, 1, 0))
    report(events.StepStarted("lower:y", "lower"))
    report(events.StepFinished("lower:y", "lower", "failed", 1.0, 0))
    after = terminal.seen()
    assert after.cursor and after.lines == [
        "0 done, 0 up to date, 1 failed, 0 not tried; 1.0 s",
        "!! lower:y  failed after 1.0 s",
        "",
    ]


def test_what_was_made_stands_at_the_end_and_what_to_do_with_it(terminal: Terminal) -> None:
    report = screen(terminal)
    report(events.StepStarted("lower:x", "lower"))
    report(events.PackageInstalled("old", "dist/old", "hit", 5, 0.1, "passed", "yes"))
    report(events.PackageInstalled("gpu", "dist/gpu", "installed", 9_000_000, 0.1, "passed", "no: no GPU here"))
    report(events.PackageInstalled("e", "dist/e", "installed", 3_000_000, None, "passed", "yes"))
    report(events.PackageInstalled("a", "dist/a", "installed", 7_000_000, 0.0123, "passed", "yes"))
    report(events.RunFinished(1.0, 3, 1, 0, 0))
    assert terminal.seen().lines[-7:] == [
        "package   size    KL      library executed",
        "dist/gpu  9.0 MB  0.1000  no: no GPU here",
        "dist/e    3.0 MB          yes",
        "dist/a    7.0 MB  0.0123  yes",
        "try it: mlcbuild chat dist/a",
        "3 done, 1 up to date; 1.0 s",
        "",
    ]
    many = screen(second := type(terminal)())
    many(events.StepStarted("lower:x", "lower"))
    for number in range(25):
        many(events.PackageInstalled(str(number), f"dist/{number}", "installed", 9, None, "passed", "no"))
    many(events.RunFinished(1.0, 25, 0, 0, 0))
    assert second.seen().lines[-4:] == ["dist/19  9 B       no", "and 5 more", "25 done, 0 up to date; 1.0 s", ""]


def test_a_program_that_ends_without_a_word_takes_its_display_along(tmp_path: Path) -> None:
    """`mlcbuild test-run` reports steps, and no end."""
    program = """
import sys
from mlcbuild.reporting import events
from mlcbuild.reporting.screen import screen
report = screen(sys.stdout)
report(events.StepStarted("lower:x", "lower"))
report(events.StepFinished("lower:x", "lower", "built", 1.0, 5))
report(events.StepStarted("lower:y", "lower"))
"""
    status, written, after = on_terminal([sys.executable, "-c", program], tmp_path, {"PYTHONPATH": str(REPOSITORY)})
    assert status == 0 and BAR in written
    check_end(after)
