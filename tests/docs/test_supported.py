"""The tables of what is supported are those that scripts/supported.py makes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

MARKS = "<!-- supported: begin -->\n<!-- supported: end -->\n"


def supported(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "scripts" / "supported.py")
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The files that the tables are made from, without the weights of models, and a README with the marks."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"# A title\n\n{MARKS}\nThe end.\n")
    (tmp_path / "docs" / "architectures.md").write_text(f"# Architectures\n\n{MARKS}")
    return tmp_path


def test_the_tables_are_up_to_date() -> None:
    done = supported("--check")
    assert done.returncode == 0, done.stderr


def test_tables_are_written_between_the_marks_once(repository: Path) -> None:
    assert supported("--root", str(repository)).returncode == 0
    readme, page = (repository / "README.md").read_text(), (repository / "docs" / "supported.md").read_text()
    assert readme.startswith("# A title\n\n<!-- supported: begin -->\n") and readme.endswith("\nThe end.\n")
    quantizations = len(list((repository / "recipes" / "quantizations").glob("*.yaml")))
    assert f"[{quantizations} quantizations](docs/supported.md#quantizations)" in readme
    assert "`mixtral`" in page and "`chatml`" in page and "`cpu-aarch64`" in page and "`stories`" in page
    assert "| `q4f16_1` | q4 | 4 bits, groups of 32, uint32, NK | float16 | quantized, quantized | nearest |" in page
    assert supported("--root", str(repository)).stdout == ""
    assert supported("--check", "--root", str(repository)).returncode == 0


def test_a_new_file_makes_the_tables_stale(repository: Path) -> None:
    supported("--root", str(repository))
    shutil.copy(repository / "recipes/quantizations/q0f16.yaml", repository / "recipes/quantizations/half.yaml")
    before = (repository / "README.md").read_text()
    done = supported("--check", "--root", str(repository))
    assert done.returncode == 1
    assert done.stderr == "".join(
        f"{name}: not what the files in recipes/ say: run `python scripts/supported.py`\n"
        for name in ("README.md", "docs/supported.md")
    )
    assert (repository / "README.md").read_text() == before


def test_missing_marks(repository: Path) -> None:
    (repository / "README.md").write_text("# A title\n")
    done = supported("--root", str(repository))
    assert done.returncode == 1
    assert "README.md: write the lines <!-- supported: begin --> and <!-- supported: end --> once" in done.stderr


def test_files_with_mistakes(repository: Path) -> None:
    (repository / "recipes" / "wrong.yaml").write_text("model: storys\nquantization: q4f16_1\ntarget: cpu\n")
    done = supported("--check", "--root", str(repository))
    assert done.returncode == 1 and "did you mean `stories`?" in done.stderr
