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
TOOLS: tuple[str, ...] = ("numpy",)


def run(job):
    """Run it."""
    from helpers.kernels import add
    # the sum
    return 1 + 2
'''
ADD = """\
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
from .sub import sub
from mlcbuild.zig import run_zig
from mlcbuild.engine.job import Job

if TYPE_CHECKING:
    from helpers import other

SOURCE = Path(__file__).parent / "c"
"""


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "helpers" / "kernels").mkdir(parents=True)
    (tmp_path / "helpers" / "kernels" / "add.py").write_text(ADD)
    (tmp_path / "helpers" / "kernels" / "sub.py").write_text("def sub(a, b):\n    return a - b\n")
    (tmp_path / "helpers" / "kernels" / "c").mkdir()
    (tmp_path / "helpers" / "kernels" / "c" / "add.c").write_text("int add;\n")
    (tmp_path / "helpers" / "other.py").write_text("import helpers.kernels.add\n")
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


def test_what_counts_is_what_can_be_reached(step: Path) -> None:
    """Imports in functions and relative ones, files that are named, modules of mlcbuild but for its machinery."""
    found = declaration("a_step", entry="helpers.other:f").modules
    reached = {"a_step", "helpers.kernels.add", "helpers.kernels.add/c/add.c", "helpers.kernels.sub", "mlcbuild.zig"}
    assert set(found) == {*reached, "helpers.other"}
    assert set(declaration("a_step").modules) == reached


@pytest.mark.parametrize("name", ["add.py", "sub.py", "c/add.c", "c/new.h"])
def test_what_is_reached_is_code(step: Path, name: str) -> None:
    before = declaration("a_step").digest
    with (step.parent / "helpers" / "kernels" / name).open("a") as file:
        file.write("x = 1\n")
    assert declaration("a_step").digest != before


@pytest.mark.parametrize("name", ["other.py", "new.py"])
def test_what_is_not_reached_is_not(step: Path, name: str) -> None:
    before = declaration("a_step").digest
    with (step.parent / "helpers" / name).open("a") as file:
        file.write("x = 1\n")
    assert declaration("a_step").digest == before


def test_a_package_that_a_module_lies_in_runs_when_the_module_is_imported(step: Path) -> None:
    before = declaration("a_step").digest
    (step.parent / "helpers" / "__init__.py").write_text("x = 1\n")
    assert declaration("a_step").digest != before


def test_code_that_cannot_matter_does_not_count(step: Path) -> None:
    step.write_text(STEP.replace("VERSION = 1", "VERSION = 1\nCODE_COUNTS = False"))
    assert declaration("a_step").modules == ("a_step",)


def test_two_functions_of_one_module_are_two_entries(step: Path) -> None:
    one, other = (declaration("a_step", entry=f"helpers.other:{name}").digest for name in "fg")
    assert one != other


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
    with pytest.raises(MlcBuildError, match=r"a_step\.py: a step module declares TOOLS as a plain literal"):
        declaration("a_step")
    step.write_text("VERSION = = 1\n")
    with pytest.raises(MlcBuildError, match=r"a_step\.py, line 1: invalid syntax"):
        declaration("a_step")


def test_a_string_that_is_not_a_docstring_is_code() -> None:
    assert normalised("def f():\n    return 'a'") != normalised("def f():\n    return 'b'")
    assert normalised("'doc'\nx = 1") == normalised("x = 1")
