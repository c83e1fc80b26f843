"""What counts as a change of a step's code."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlcbuild.cache.index import Index
from mlcbuild.engine.code import declaration, normalised
from mlcbuild.errors import MlcBuildError

STEP = '''\
"""A step."""

VERSION = 1
CODE = ("helpers.kernels",)
TOOLS: tuple[str, ...] = ("numpy",)


def run(job):
    """Run it."""
    # the sum
    return 1 + 2
'''


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "helpers" / "kernels").mkdir(parents=True)
    (tmp_path / "helpers" / "kernels" / "add.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "helpers" / "kernels" / "add.c").write_text("int add;\n")
    path = tmp_path / "a_step.py"
    path.write_text(STEP)
    return path


def test_constants_are_read_without_importing(step: Path) -> None:
    step.write_text(STEP + "\nraise SystemExit('imported')\n")
    found = declaration("a_step")
    assert (found.version, found.tools) == (1, ("numpy",))


@pytest.mark.parametrize(
    "edited",
    [
        STEP.replace("# the sum", "# something else"),
        STEP.replace('"""Run it."""', '"""Run it, and say more."""'),
        STEP.replace('    """Run it."""\n', ""),
        STEP.replace("return 1 + 2", "return (1 +\n            2)"),
    ],
)
def test_comments_docstrings_and_formatting_are_not_code(step: Path, edited: str) -> None:
    before = declaration("a_step").digest
    step.write_text(edited)
    assert declaration("a_step").digest == before


@pytest.mark.parametrize(
    "edited",
    [STEP.replace("1 + 2", "1 + 3"), STEP.replace("VERSION = 1", "VERSION = 2"), STEP.replace("run(job)", "run(work)")],
)
def test_code_and_version_are(step: Path, edited: str) -> None:
    before = declaration("a_step").digest
    step.write_text(edited)
    assert declaration("a_step").digest != before


@pytest.mark.parametrize("name", ["add.py", "add.c", "new.py"])
def test_declared_packages_count_with_all_their_files(step: Path, name: str) -> None:
    before = declaration("a_step").digest
    with (step.parent / "helpers" / "kernels" / name).open("a") as file:
        file.write("x = 1\n")
    assert declaration("a_step").digest != before


def test_the_memo_saves_parsing_and_notices_edits(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(step.parent / "index.sqlite")
    before = declaration("a_step", index)
    with monkeypatch.context() as context:
        context.setattr("ast.parse", lambda *_: pytest.fail("parsed again"))
        assert declaration("a_step", index) == before
    step.write_text(STEP.replace("1 + 2", "1 + 3"))
    assert declaration("a_step", index) != before


def test_errors_name_what_is_missing(step: Path) -> None:
    with pytest.raises(MlcBuildError, match=r"no_such_step: no such module"):
        declaration("no_such_step")
    step.write_text("VERSION = 1\n")
    with pytest.raises(MlcBuildError, match=r"a_step\.py: a step module declares CODE, TOOLS as a plain literal"):
        declaration("a_step")
    step.write_text("VERSION = = 1\n")
    with pytest.raises(MlcBuildError, match=r"a_step\.py, line 1: invalid syntax"):
        declaration("a_step")


def test_a_string_that_is_not_a_docstring_is_code() -> None:
    assert normalised("def f():\n    return 'a'") != normalised("def f():\n    return 'b'")
    assert normalised("'doc'\nx = 1") == normalised("x = 1")
