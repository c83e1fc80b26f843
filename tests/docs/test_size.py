"""scripts/size.py, which CI runs: what it counts, and when it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


def size(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "size.py"), "--root", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def write(root: Path, path: str, lines: int) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text("x = 1\n" * lines)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two packages and an architecture, committed; `main` is the branch."""
    write(tmp_path, "mlcbuild/cli/main.py", 100)
    write(tmp_path, "mlcbuild/cli/__init__.py", 1)
    write(tmp_path, "mlcbuild/tasks.py", 30)
    write(tmp_path, "recipes/architectures/llama.yaml", 50)
    author = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    for words in (["init", "-q", "-b", "main"], ["add", "."], [*author, "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def test_lines_by_package_and_the_change_since_main(repository: Path) -> None:
    write(repository, "mlcbuild/cli/main.py", 90)
    write(repository, "mlcbuild/cli/gc.py", 40)
    done = size(repository)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["mlcbuild/cli", "131", "+30"] in rows
    assert ["mlcbuild/tasks.py", "30"] in rows
    assert ["recipes/architectures", "50"] in rows
    assert "1 of 4 Python files are under 35 lines: mlcbuild/tasks.py" in done.stdout


def test_without_git_there_is_no_change_to_show(tmp_path: Path) -> None:
    write(tmp_path, "mlcbuild/cli/main.py", 100)
    done = size(tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[0].split() == ["mlcbuild/cli", "100"]


def test_each_bound_fails_with_a_sentence(repository: Path) -> None:
    for number in range(126):
        write(repository, f"mlcbuild/steps/step{number}.py", 400)
    write(repository, "mlcbuild/planning/planner.py", 401)
    write(repository, "recipes/architectures/llama.yaml", 5101)
    done = size(repository)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "mlcbuild/ has 50,932 lines, 432 over its budget of 50,500",
        "recipes/architectures/ has 5,101 lines, 1 over its budget of 5,100",
        "mlcbuild/planning/planner.py has 401 lines, over 400: split it by its ideas",
    ]
