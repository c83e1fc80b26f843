"""`recipe=NAMES`: names, commas and globs."""

from __future__ import annotations

import pytest

from mlcbuild.errors import RecipeError
from mlcbuild.recipes.select import select
from mlcbuild.recipes.types import Catalog
from tests.recipes.conftest import RECIPE, Workspace


@pytest.fixture
def catalog(workspace: Workspace) -> Catalog:
    for name in ("chat-cpu", "chat-cuda", "tales-cpu"):
        workspace.write(f"{name}.yaml", RECIPE)
    return workspace.load()


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("tales-cpu", ["tales-cpu"]),
        ("tales-cpu, chat-cpu", ["tales-cpu", "chat-cpu"]),
        ("chat-*", ["chat-cpu", "chat-cuda"]),
        ("*-cpu,chat-*", ["chat-cpu", "tales-cpu", "chat-cuda"]),
        ("chat-c?u", ["chat-cpu"]),
        ("chat-[!x]uda", ["chat-cuda"]),
        ("*", ["chat-cpu", "chat-cuda", "tales-cpu"]),
    ],
)
def test_what_is_meant(catalog: Catalog, pattern: str, names: list[str]) -> None:
    assert [recipe.name for recipe in select(catalog, pattern)] == names


@pytest.mark.parametrize(
    ("pattern", "problems"),
    [
        ("tale-cpu", ["no recipe is named `tale-cpu`; did you mean `tales-cpu`?"]),
        ("Chat-CPU", ["no recipe is named `Chat-CPU`; did you mean `chat-cpu`?"]),
        ("tale-*", ["no recipe matches `tale-*`; `doit list --all` names them"]),
        ("nothing-like-it", ["no recipe is named `nothing-like-it`; `doit list --all` names them"]),
        (
            "chat-cpu,,tales-cpu",
            ["recipe=chat-cpu,,tales-cpu: a name is missing; write names and globs with commas between them"],
        ),
        ("", ["recipe=: a name is missing; write names and globs with commas between them"]),
        (
            "chatcpu,tales-cpu,tales-cpux",
            [
                "no recipe is named `chatcpu`; did you mean `chat-cpu`?",
                "no recipe is named `tales-cpux`; did you mean `tales-cpu`?",
            ],
        ),
    ],
)
def test_what_matches_nothing(catalog: Catalog, pattern: str, problems: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        select(catalog, pattern)
    assert list(error.value.problems) == problems


def test_an_empty_workspace(workspace: Workspace) -> None:
    with pytest.raises(RecipeError, match=r"^no recipe is named `x`; this workspace has no recipes$"):
        select(workspace.load(), "x")
