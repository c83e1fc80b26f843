"""The commands that pages show are run, in a workspace of toy steps; those of the tutorial: test_tutorial.py."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.pages import DOCS, ROOT, blocks, code
from tests.engine.workspace import Workspace, make_workspace
from tests.workspace.test_maintenance import mlcbuild

PAGES = (
    ROOT / "README.md",
    *(DOCS / f"{name}.md" for name in ("building", "nightly", "reports", "cache", "sharing", "phone", "web")),
)
# What a reader has in place of it.
PLACEHOLDERS = {
    "NAME": "stories-cpu",
    "DIR": "elsewhere",
    "URL": "shared",
    "s3://our-bucket/mlcbuild": "shared",
    "build:X": "build:stories-cpu",
    "tale-*": "stories-*",
    "stories-web": "stories-cpu",
    "TASK": "build:stories-cpu",
}
ELSEWHERE = {
    "generate": "needs a real package: test_tutorial.py",
    "new": "needs a checkpoint: tests/inspect",
    "publish": "needs a hub: tests/publishing",
}


def commands(page: Path) -> list[list[str]]:
    """The words of each command in an indented line, without what is said of it, and of those of doit in tables."""
    text, found = page.read_text(), []
    shown = [
        re.sub(r"\[(.*?)\]", r"\1", re.split(r"\s#|\s{2,}", line)[0])  # in brackets: what may be left out
        for line in re.findall(r"^ {4}(?:30 2 \* \* \*  .*/bin/)?((?:doit|mlcbuild) .*)$", text, re.MULTILINE)
    ]
    shown += [command for cell in re.findall(r"^\| (`doit [^|]*)\|", text, re.MULTILINE) for command in code(cell)]
    for command in ";".join(shown).split(";"):
        for placeholder, thing in PLACEHOLDERS.items():
            command = command.replace(placeholder, thing)
        found.append(shlex.split(command))
    return found


@pytest.fixture
def versioned(tmp_path: Path) -> Workspace:
    """A workspace with the recipe of the pages, under version control, with a branch `origin/main`."""
    workspace = make_workspace(tmp_path)
    workspace.write("recipes/stories-cpu.yaml", "model: tiny\nquantization: q4f16_1\ntarget: cpu\n")
    workspace.write(".gitignore", "/cache\n/dist\n")
    author = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "all"], ["branch", "-q", "origin/main"]):
        subprocess.run(["git", *words], cwd=workspace.root, check=True)
    return workspace


@pytest.mark.slow
def test_every_command_of_these_pages_works(versioned: Workspace) -> None:
    ran = 0
    for page in PAGES:
        for words in commands(page):
            if words[1] in ELSEWHERE:
                continue
            for log in ("monday.jsonl", "tuesday.jsonl"):
                if log in words:
                    shutil.copy(versioned.root / "nights.jsonl", versioned.root / log)
            if words[0] == "doit":
                versioned.doit(*words[1:], status=None if words[1] == "info" else 0)  # 1: it is not up to date
            else:
                mlcbuild(versioned, *words[1:])
            ran += 1
    assert ran >= 37
    for name in ("report.html", "summary.md", "week.html", "nights.jsonl", "shared/ac", "elsewhere/dodo.py"):
        assert (versioned.root / name).exists(), name


@pytest.mark.slow
@pytest.mark.parametrize("event", ["pull_request", "schedule"])
def test_the_nightly_workflow_builds_and_sums_up(versioned: Workspace, tmp_path: Path, event: str) -> None:
    """The steps of docs/nightly.md that are no other people's actions, in their shell."""
    (text,) = [block.text for block in blocks((DOCS / "nightly.md").read_text()) if block.language == "yml"]
    workflow: Any = yaml.safe_load(text)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TOY_TRICKS": str(versioned.tricks),
        "GITHUB_BASE_REF": "main",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "step-summary.md"),
    }
    versioned.write("recipes/new.yaml", "model: tiny\nquantization: q8f16_1\ntarget: cpu\n")  # what is proposed
    for step in workflow["jobs"]["build"]["steps"]:
        asked = re.search(r"event_name (==|!=) '(\w+)'", step.get("if", ""))
        wanted = asked is None or (asked[1] == "==") == (event == asked[2])
        if "run" in step and wanted and not step["run"].startswith("pip "):
            command = ["bash", "-e", "-o", "pipefail", "-c", step["run"]]
            done = subprocess.run(command, cwd=versioned.root, env={**os.environ, **environment}, capture_output=True)
            assert done.returncode == 0, f"{step}\n{done.stdout.decode()}{done.stderr.decode()}"
    summary = (tmp_path / "step-summary.md").read_text()
    assert "new" in summary and ("stories-cpu" in summary) is (event == "schedule")
    assert (versioned.root / "report.html").stat().st_size > 1000
    assert sorted(path.name for path in versioned.dist.iterdir() if path.is_dir()) == (
        ["new"] if event == "pull_request" else ["new", "stories-cpu", "tiny-q4f16_1-cpu", "tiny-q4f32_1-cpu"]
    )
