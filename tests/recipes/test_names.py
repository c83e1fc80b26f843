"""Names: which file is meant, and what is said when there is none, or more than one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlcbuild.errors import MlcBuildError, RecipeError
from mlcbuild.recipes.files import find_root, stock
from mlcbuild.recipes.load import load, read
from mlcbuild.recipes.types import AUTO_TEMPLATE
from tests.recipes.conftest import RECIPE, Workspace


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            RECIPE.replace("tiny", "tny"),
            "1:8: `model` is `tny`, expected a name of recipes/models/; did you mean `tiny`?",
        ),
        (
            RECIPE.replace("tiny", "gigantic"),
            "1:8: `model` is `gigantic`, expected a name of recipes/models/; there is `tiny`",
        ),
        (
            RECIPE.replace("q4f16_1", "q4f16-1"),
            "2:15: `quantization` is `q4f16-1`, expected a name of recipes/quantizations/; did you mean `q4f16_1`?",
        ),
        (
            RECIPE.replace("cpu", "gpu"),
            "3:9: `target` is `gpu`, expected a name of recipes/targets/; did you mean `cpu`?",
        ),
        (
            RECIPE + "template: chatlm\n",
            "4:11: `template` is `chatlm`, expected a name of recipes/templates/; did you mean `chatml`?",
        ),
    ],
)
def test_an_unknown_name_in_a_recipe(workspace: Workspace, text: str, problem: str) -> None:
    assert workspace.problem("bad.yaml", text) == problem


def test_the_template_auto_is_no_file(workspace: Workspace) -> None:
    """It is worked out from the checkpoint's own chat template when a package is made."""
    workspace.write("models/own.yaml", "source: {path: .}\ntemplate: auto\n")
    workspace.write("own.yaml", RECIPE.replace("tiny", "own"))
    workspace.write("other.yaml", RECIPE + "template: auto\n")
    catalog = load(workspace.root)
    assert catalog.recipes["own"].template == catalog.recipes["other"].template == AUTO_TEMPLATE
    assert "auto" not in catalog.templates


def test_a_file_cannot_be_called_auto(workspace: Workspace) -> None:
    assert workspace.problem("templates/auto.yaml", "roles: {user: U, assistant: A}\nseps: [x]\n") == (
        "1:1: rename the file: `template: auto` means the one that a checkpoint brings"
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            "template: chat_ml",
            "2:11: `template` is `chat_ml`, expected a name of recipes/templates/; did you mean `chatml`?",
        ),
        (
            "template: chatml\narchitecture: lama",
            "3:15: `architecture` is `lama`, expected a name of recipes/architectures/; did you mean `llama`?",
        ),
        ("extends: tinny", "2:10: `extends` is `tinny`, expected a name of recipes/models/; did you mean `tiny`?"),
    ],
)
def test_an_unknown_name_in_a_model(workspace: Workspace, line: str, problem: str) -> None:
    assert workspace.problem("models/bad.yaml", f"source: {{path: .}}\n{line}\n") == problem


def test_a_name_in_a_file_with_a_mistake_is_not_an_unknown_name(workspace: Workspace) -> None:
    workspace.write("models/mine.yaml", "template: chatml\n")
    workspace.write("mine-cpu.yaml", RECIPE.replace("tiny", "mine"))
    assert [problem.split(":")[0] for problem in workspace.problems()] == ["recipes/models/mine.yaml"]


def test_paths_that_lead_nowhere(workspace: Workspace) -> None:
    workspace.write(
        "models/gone.yaml", "source: {path: ../checkpoints/gone}\ntemplate: chatml\nverify: {text: e.txt}\n"
    )
    workspace.write("models/file.yaml", "source: {path: file.yaml}\ntemplate: chatml\nverify: {text: .}\n")
    workspace.write("long.yaml", RECIPE + f"verify: {{text: {'x' * 300}}}\n")
    models = workspace.root / "recipes" / "models"
    long, *others = workspace.problems()
    assert others == [
        "recipes/models/file.yaml:1:16: `source.path` is `file.yaml`, expected a folder; "
        f"{models}/file.yaml is not a folder",
        f"recipes/models/file.yaml:3:16: `verify.text` is `.`, expected a file; {models} is not a file",
        "recipes/models/gone.yaml:1:16: `source.path` is `../checkpoints/gone`, expected a folder; "
        f"{workspace.root}/recipes/checkpoints/gone is not there",
        f"recipes/models/gone.yaml:3:16: `verify.text` is `e.txt`, expected a file; {models}/e.txt is not there",
    ]
    assert long.startswith(f"recipes/long.yaml:4:16: `verify.text` is `{'x' * 59}…`, expected a file; ")


def test_paths_are_relative_to_the_file_that_says_them(workspace: Workspace) -> None:
    (workspace.root / "checkpoint").mkdir()
    workspace.write("texts/e.txt", "text")
    workspace.write(
        "models/mine.yaml", "source: {path: ../../checkpoint}\ntemplate: chatml\nverify: {text: ../texts/e.txt}\n"
    )
    workspace.write("mine.yaml", RECIPE.replace("tiny", "mine") + "verify: {text: texts/e.txt}\n")
    catalog = workspace.load()
    assert catalog.models["mine"].source.path == workspace.root / "checkpoint"
    assert (
        catalog.models["mine"].verify.text
        == catalog.recipes["mine"].verify.text
        == workspace.root / "recipes/texts/e.txt"
    )


def test_two_files_of_one_name(workspace: Workspace) -> None:
    workspace.write("models/twice.yaml", "source: {path: .}\ntemplate: chatml\n")
    workspace.write("models/twice.yml", "source: {path: .}\ntemplate: chatml\n")
    assert workspace.problems() == [
        "recipes/models/twice.yml:1:1: the name `twice` is taken by recipes/models/twice.yaml; "
        "rename or remove one of the two"
    ]


def test_a_cell_with_the_name_of_a_recipe(workspace: Workspace) -> None:
    workspace.write("tiny-q4f16_1-cpu.yaml", RECIPE)
    problem = workspace.problem("matrix/m.yaml", "matrix: {model: [tiny], quantization: [q4f16_1], target: [cpu]}\n")
    assert problem == (
        "1:1: the cell `tiny-q4f16_1-cpu` has the name of a recipe of recipes/tiny-q4f16_1-cpu.yaml; "
        "exclude the cell or rename the recipe"
    )


def test_two_matrices_with_one_cell(workspace: Workspace) -> None:
    for name in ("a", "b"):
        workspace.write(f"matrix/{name}.yaml", "matrix: {model: [tiny], quantization: [q4f16_1], target: [cpu]}\n")
    assert workspace.problems() == [
        "recipes/matrix/b.yaml:1:1: the cell `tiny-q4f16_1-cpu` has the name of a recipe of recipes/matrix/a.yaml; "
        "exclude the cell or rename the recipe"
    ]


@pytest.mark.parametrize("name", ["-x", "_x", "a b", "ä", ".hidden/../x", "x\n"])
def test_a_file_name_that_is_no_name(workspace: Workspace, name: str) -> None:
    path = workspace.root / "recipes" / f"{name.replace('/', '')}.yaml"
    path.write_text(RECIPE)
    problems = workspace.problems()
    if path.name.startswith("."):
        assert problems == []  # editors' own files
    else:
        assert [problem.split(":1:1: ")[1] for problem in problems] == [
            "rename the file: a name is letters, digits, `.`, `_` and `-`, starting with a letter or a digit"
        ]
        assert "\n" not in problems[0]


def test_a_folder_that_nothing_reads(workspace: Workspace) -> None:
    workspace.write("model/mine.yaml", "source: {path: .}\ntemplate: chatml\n")
    workspace.write("nightly/mine.yaml", RECIPE)
    workspace.write("notes/plan.txt", "not YAML, nobody's business")
    assert workspace.problems() == [
        "recipes/model/mine.yaml:1:1: nothing reads the folder recipes/model/; did you mean `models`?",
        "recipes/nightly/mine.yaml:1:1: nothing reads the folder recipes/nightly/; the folders are matrix/, models/, "
        "architectures/, quantizations/, targets/, templates/",
    ]


def test_a_file_that_cannot_be_read(workspace: Workspace) -> None:
    (workspace.root / "recipes" / "gone.yaml").symlink_to("nowhere")
    assert workspace.problems() == [
        "recipes/gone.yaml:1:1: cannot be read: No such file or directory: it is a symbolic link to nowhere: put that "
        "back, or remove the link"
    ]


def test_a_workspace_file_takes_the_place_of_a_stock_file(workspace: Workspace) -> None:
    workspace.write("templates/chatml.yaml", "roles: {user: U, assistant: A}\nseps: [x]\n")
    workspace.write("r.yaml", RECIPE)
    catalog = workspace.load()
    assert catalog.recipes["r"].template.data["seps"] == ["x"]
    assert catalog.warnings == ("recipes/templates/chatml.yaml:1:1: takes the place of the stock template `chatml`",)


def test_stock_recipes_belong_to_the_repository_only(workspace: Workspace) -> None:
    workspace.write("r.yaml", RECIPE)
    assert list(workspace.load().recipes) == ["r"]


def test_the_repository_is_a_workspace_and_does_not_shadow_itself() -> None:
    reading = read(stock().recipes.parent)
    assert reading.warnings == ()
    assert reading.counts["recipe"] > 0 and reading.counts["matrix"] > 0


def test_no_workspace(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: no folder `recipes` here, so this is not a workspace; `mlcbuild init DIR` makes one"
    )


def test_the_workspace_around_a_folder(workspace: Workspace) -> None:
    inner = workspace.root / "recipes" / "models"
    inner.mkdir()
    with pytest.raises(MlcBuildError, match=r"not inside a workspace .*; `mlcbuild init DIR` makes one"):
        find_root(inner)
    (workspace.root / "dodo.py").touch()
    assert find_root(inner) == workspace.root
