"""FAULTS.md C, a sibling of every call that may fail: what `ulimit` leaves is too little, and a build says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.workspace import REPOSITORY, Workspace

RECIPE = "recipe=tiny-q4f16_1-cpu"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory")
@pytest.mark.parametrize(
    ("option", "values", "said"),
    [
        ("-v", (120_000, 250_000), "`ulimit -v`"),
        ("-n", (6, 9, 12), "too many files are open: "),
        ("-f", (0, 4), "the file gets larger than is allowed here: raise the limit (`ulimit -f unlimited`)"),
    ],
)
def test_small_limits_give_sentences(workspace: Workspace, option: str, values: tuple[int, ...], said: str) -> None:
    outputs = []
    for value in values:
        command = f"ulimit {option} {value} && exec {sys.executable} -m doit build {RECIPE} log_json=log.jsonl"
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=workspace.root,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "TOY_TRICKS": str(workspace.tricks)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        outputs.append(f"{option} {value}: status {done.returncode}\n{done.stdout}{done.stderr}")
        assert "Traceback" not in outputs[-1] and "bug in the step" not in outputs[-1], outputs[-1]
        assert done.returncode == 0 or said in outputs[-1], outputs[-1]
    assert not outputs[0].startswith(f"{option} {values[0]}: status 0"), outputs[0]
    workspace.doit("build", RECIPE)  # what was left behind is mended


def test_no_more_threads(workspace: Workspace, tmp_path: Path) -> None:
    """Each thread of doit takes room of its own; that the next one could not be started was a traceback."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import threading\nthreading.stack_size(1 << 50)\n", encoding="utf-8"
    )  # more than any machine has room for
    output = workspace.doit("build", RECIPE, status=3, PYTHONPATH=f"{site}:{REPOSITORY}")
    assert "no more processes or threads can be started: " in output and "Traceback" not in output
