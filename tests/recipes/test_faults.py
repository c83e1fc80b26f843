"""Files of a workspace that once ended in a traceback, in silence, or not at all (the letters are FAULTS.md's)."""

from __future__ import annotations

import errno
import os
import time

import pytest

from mlcbuild.errors import RecipeError
from mlcbuild.recipes import expand
from mlcbuild.recipes.document import Document
from mlcbuild.recipes.files import File, unreadable
from mlcbuild.recipes.load import check, render
from mlcbuild.recipes.problems import Hints
from tests.recipes.conftest import RECIPE, Workspace

MODEL = "source: {path: .}\ntemplate: chatml\n"


def test_fault_C_symlink_loop(workspace: Workspace) -> None:
    """A file's, a folder's, and one of a folder that nothing reads."""
    folder = workspace.root / "recipes"
    for name in ("r.yaml", "models", "other"):
        (folder / name).symlink_to(name)
    assert workspace.problems() == [
        "recipes/models:1:1: cannot be read: Too many levels of symbolic links",
        "recipes/r.yaml:1:1: cannot be read: Too many levels of symbolic links",
    ]


def test_fault_C_links_that_lead_nowhere(workspace: Workspace) -> None:
    """A sibling of the loop: a folder whose link leads nowhere had no files, and nothing was said."""
    folder = workspace.root / "recipes"
    (folder / "r.yaml").symlink_to("gone.yaml")
    (folder / "matrix").symlink_to("/gone/matrix")
    text = "1:1: cannot be read: No such file or directory: it is a symbolic link to"
    assert workspace.problems() == [
        f"recipes/matrix:{text} /gone/matrix: put that back, or remove the link",
        f"recipes/r.yaml:{text} gone.yaml: put that back, or remove the link",
    ]


def test_fault_C_a_disk_that_fails() -> None:
    """A sibling: an error of reading names no file, which was a TypeError."""
    text = "recipes/r.yaml:1:1: cannot be read: Input/output error"
    assert str(unreadable("recipes/r.yaml", OSError(errno.EIO, os.strerror(errno.EIO)))) == text


@pytest.mark.parametrize(("name", "ending"), [("R.YAML", ".yaml"), ("models/m.Yml", ".yml")])
def test_fault_C_ending_in_capitals(workspace: Workspace, name: str, ending: str) -> None:
    assert workspace.problem(name, RECIPE) == f"1:1: rename the file: its name ends in `{ending}`, in small letters"


def test_fault_C_long_names(workspace: Workspace) -> None:
    """The steps of such a recipe ended as "a bug in the step": their names are names of files."""
    name = "n" * 201
    assert workspace.problem(f"models/{name}.yaml", MODEL) == "1:1: rename the file: a name has at most 200 characters"
    (workspace.root / f"recipes/models/{name}.yaml").unlink()
    workspace.write(f"models/{name[1:]}.yaml", MODEL)
    problem = workspace.problem("r.yaml", RECIPE.replace("tiny", name[1:]))
    assert problem.endswith("have 212 characters together, at most 200 are possible")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("\tmodel: tiny\n", "1:1"),
        (RECIPE + "verify:\n\tkl: 1\n", "5:1"),
        (RECIPE + "verify:\n  kl: 1\n\tgate: fail\n", "6:1"),
    ],
)
def test_fault_C_tab_indentation(workspace: Workspace, text: str, place: str) -> None:
    assert workspace.problem("r.yaml", text) == f"{place}: not valid YAML: a tab is used for indentation; use spaces"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("model:\u00a0tiny\nquantization: q4f16_1\ntarget: cpu\n", "1:7"),
        ("model: tiny\nverify:\n \u00a0kl: 1\n  gate: fail\n", "3:2"),
    ],
)
def test_fault_C_no_break_space(workspace: Workspace, text: str, place: str) -> None:
    """The parser takes it for a letter, and stumbles over something behind it."""
    problem = workspace.problem("r.yaml", text)
    assert problem == f"{place}: a no-break space (U+00A0) is no space in YAML; write an ordinary one"


def test_fault_C_no_break_space_in_a_text_is_one(workspace: Workspace) -> None:
    workspace.write("templates/t.yaml", "roles: {user: U\u00a0x, assistant: A}\nseps: [x]\n")
    assert workspace.problems() == []
    assert workspace.problem("r.yaml", "model: a\u00a0b\ntarget: [\n").startswith("3:1: not valid YAML: did not find")


def test_fault_D_fifo(workspace: Workspace) -> None:
    os.mkfifo(workspace.root / "recipes" / "r.yaml")
    os.mkfifo(workspace.root / "recipes" / "recipes.lock")
    assert workspace.problems() == ["recipes/r.yaml:1:1: cannot be read: it is not a regular file"]
    assert "recipes/recipes.lock:1:1: cannot be read: it is not a regular file" in map(
        str, check(workspace.root).problems
    )


def test_fault_D_device_without_end(workspace: Workspace) -> None:
    (workspace.root / "recipes" / "r.yaml").symlink_to("/dev/zero")
    assert workspace.problems() == ["recipes/r.yaml:1:1: cannot be read: it is not a regular file"]


def test_fault_D_alias_bomb(workspace: Workspace) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 13)]
    began = time.monotonic()
    problem = workspace.problem("models/m.yaml", "\n".join(lines))
    assert problem.endswith("aliases repeat more than 100,000 values; write it out shorter")
    assert time.monotonic() - began < 20


def test_aliases_are_still_values(workspace: Workspace) -> None:
    workspace.write("models/m.yaml", "source: &here {path: .}\ntemplate: chatml\n")
    workspace.write("r.yaml", "model: m\nquantization: &q q4f16_1\ntarget: cpu\n")
    workspace.write("matrix/m.yaml", "matrix: &m {model: &n [tiny], quantization: [q0f32], target: [cpu]}\n")
    assert workspace.problems() == []


@pytest.mark.slow
def test_fault_D_texts_have_bounds(workspace: Workspace) -> None:
    """A file that is no recipe made 192 MB of errors, or quoted megabytes of itself."""
    workspace.write("r.yaml", f"model: {'x' * 100_000}: y\n{'k' * 100_000}: 1\n")
    workspace.write(
        "models/m.yaml", MODEL + "verify: {" + ", ".join(f"k{number}: 1" for number in range(9_000)) + "}\n"
    )
    reading = check(workspace.root)
    assert len(reading.problems) == 9_001
    text = render(reading)
    assert "… and 8,001 more problems" in text and "9001 problems in 2 files" in text and len(text) < 1_500_000
    assert all(len(line) < 2_200 for line in text.splitlines())
    with pytest.raises(RecipeError, match="… and 8,001 more problems"):
        workspace.load()


def test_fault_E_a_long_chain_of_extends(workspace: Workspace) -> None:
    """Every model was merged with all below it: 25 seconds for 1,500."""
    folder = workspace.root / "recipes" / "models"
    documents = {}
    for number in reversed(range(1500)):
        name, data = f"m{number}", {"extends": f"m{number - 1}"} if number else {"source": {"path": "."}}
        documents[name] = Document(File("model", name, folder / f"{name}.yaml", name), b"", data)
    began = time.monotonic()
    whole, problems = expand.inherit(documents)
    assert not problems and whole["m1499"] == {"source": {"path": folder}}
    assert time.monotonic() - began < 5


def test_fault_E_thousands_of_misspelt_names(workspace: Workspace) -> None:
    """Each was compared with every name: 12.7 seconds for 500 among 5,000. Now the first ones are."""
    names = {f"model-{number}": None for number in range(5000)}
    hints, began = Hints(), time.monotonic()
    said = [hints(f"modle-{number}", names) for number in range(5000)]
    assert time.monotonic() - began < 10
    assert said[1] == "; did you mean `model-1`?" and said[-1] == ""
